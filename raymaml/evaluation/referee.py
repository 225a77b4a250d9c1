"""What a sweep remembers: every validation of every trial in the order in which they came.

The order is what an asynchronous scheduler decides by. ``state.json`` holds it, with each
decision; so a sweep that was killed has its scheduler decide all over again, in that order, and
goes on where it was. Nothing else is remembered but the run folders of the trials.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raymaml.common.errors import UserError
from raymaml.common.untrusted import parse_json
from raymaml.storage.files import exists, read_bytes, write_text
from raymaml.storage.place import Place
from raymaml.training.identity import as_meant, differences, flat
from raymaml.training.state import Validation

STATE_FILE = "state.json"
SCHEMA_VERSION = 1
Decide = Callable[[int, int, float], bool]
"""Takes trial, outer step and accuracy, in the order of the reports; tells whether it goes on."""
Status = Literal["waiting", "running", "stopped", "done", "failed"]


def run_name(trial: int, step: int | None = None) -> str:
    """Return the name of a trial's run; ``step``: where it took over the weights of another."""
    return f"trial-{trial:05d}" + ("" if step is None else f"-step-{step:08d}")


_RUN_NAME = r"^trial-\d{5}(-step-\d{8})?$"
"""What ``run_name`` gives: nothing that leads out of the folder of the sweep."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One validation of one trial, and what was decided."""

    trial: Annotated[int, Field(ge=0)]
    run: Annotated[str, Field(pattern=_RUN_NAME)]
    """Name of the run folder."""
    step: Annotated[int, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    ci95: float
    goes_on: bool


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    identity: dict[str, Any]
    reports: list[Report]
    failures: dict[int, str]
    """Messages by trial."""


class Referee:
    """Takes all reports, decides, and has them on disk before the answer is given.

    Args:
        folder: of the sweep.
        identity: what decides the trials, by name; a sweep is gone on with by the same alone.
        decide: the scheduler, which has seen nothing yet.
        require: raises where this process may not write the state any more.

    Raises:
        UserError: the folder's state is damaged, or of another identity.
    """

    def __init__(
        self,
        folder: Place,
        identity: Mapping[str, Any],
        decide: Decide,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = folder / STATE_FILE
        self._identity = json.loads(json.dumps(identity))
        self._decide = decide
        self._require = require
        self._lock = threading.Lock()
        self.watch: Callable[[int], None] = lambda _trial: None
        """Called with the number of a trial after each news of it."""
        self.reports: list[Report] = []
        self.failures: dict[int, str] = {}
        if exists(self._path):
            self._go_on(_read(self._path))

    def _go_on(self, state: _State) -> None:
        changed = _changes(state.identity, self._identity)
        if changed:
            raise UserError(
                *(
                    f"{self._path.parent}: was started with {key} = {had!r}, the sweep now says"
                    f" {has!r}; give the old value to go on, or another name to start anew"
                    for key, (had, has) in changed.items()
                )
            )
        self.reports, self.failures = state.reports, state.failures
        for report in self.reports:  # fills the scheduler's memory; what was decided stays
            self._decide(report.trial, report.step, report.accuracy)

    def report(self, trial: int, run: str, validation: Validation) -> bool:
        """Take a validation and tell whether the trial goes on.

        One that is known already, since the trial was killed after it, gets the same answer.
        """
        with self._lock:
            for known in self.reports:
                if (known.trial, known.step) == (trial, validation.step):
                    return known.goes_on
            found = Report(
                trial=trial,
                run=run,
                step=validation.step,
                accuracy=validation.accuracy,
                ci95=validation.ci95,
                goes_on=self._decide(trial, validation.step, validation.accuracy),
            )
            self.reports.append(found)
            self._write()
        self.watch(trial)
        return found.goes_on

    def fail(self, trial: int, problem: str) -> None:
        """Take note that a trial cannot go on, and why."""
        with self._lock:
            self.failures[trial] = problem
            self._write()
        self.watch(trial)

    def forgive(self, trial: int) -> None:
        """Forget that a trial failed: it is tried again."""
        with self._lock:
            if self.failures.pop(trial, None) is not None:
                self._write()

    def of(self, trial: int) -> list[Report]:
        """Return the reports of one trial, in their order."""
        return [report for report in self.reports if report.trial == trial]

    def status(self, trial: int, num_steps: int) -> Status:
        """Tell how it stands with a trial of ``num_steps`` outer steps."""
        reports = self.of(trial)
        if trial in self.failures:
            return "failed"
        if any(report.step >= num_steps for report in reports):
            return "done"
        if any(not report.goes_on for report in reports):
            return "stopped"
        return "running" if reports else "waiting"

    def best(self, trials: int) -> Report | None:
        """Return the best report of the first ``trials`` trials; of equal ones the first."""
        reports = [report for report in self.reports if report.trial < trials]
        return max(reports, key=lambda report: report.accuracy, default=None)

    def _write(self) -> None:
        self._require()
        state = _State(
            schema_version=SCHEMA_VERSION,
            identity=self._identity,
            reports=self.reports,
            failures=self.failures,
        )
        write_text(self._path, state.model_dump_json(indent=1) + "\n")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two identities of a sweep: by key, the value before and now.

    A key of the config that did not exist before stands for its default of then.
    """
    configs = [flat(as_meant(_config_of(identity))) for identity in (before, now)]
    found = {f"config.{key}": pair for key, pair in differences(*configs).items()}
    rest = {key: (before.get(key), value) for key, value in now.items() if key[:7] != "config."}
    had = before.get("validation")
    if isinstance(had, Mapping) and isinstance(now.get("validation"), Mapping):
        rest |= {key: (had.get(key), value) for key, value in now["validation"].items()}
    rest.pop("validation", None)  # what an earlier version did not keep
    return found | {key: (had, has) for key, (had, has) in rest.items() if had != has}


def _config_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "config."
    return {key[len(prefix) :]: value for key, value in identity.items() if key[:7] == prefix}


def _read(path: Place) -> _State:
    try:
        content = parse_json(read_bytes(path))
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{path}: has schema_version {found}, this raymaml reads {SCHEMA_VERSION}; use the"
                " raymaml that wrote it"
            )
        return _State.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{path}: is damaged ({error}); restore it from a copy, or give the sweep another name"
        ) from None


def always(_trial: int, _step: int, _accuracy: float) -> bool:
    """Let every trial go on."""
    return True
