"""The journal of a sweep: every validation of every trial, in the order in which they came.

An asynchronous scheduler decides by that order. ``state.json`` holds it with each decision: after
a kill the scheduler sees all reports again, in order, and the sweep goes on where it was. Beside
it there are only the run folders of the trials.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import checked, parse_json, shortened
from raymaml.storage.files import exists, read_bytes, write_text
from raymaml.storage.place import Place
from raymaml.training.identity import differences
from raymaml.training.state import Validation

STATE_FILE = "state.json"
SCHEMA_VERSION = 2
Decide = Callable[[int, int, float], bool]
"""Takes trial, outer step and accuracy, in the order of the reports; whether the trial goes on."""
Status = Literal["begun", "stopped", "done", "failed"]


@dataclass(frozen=True)
class Report:
    """One validation of one trial, and the decision."""

    trial: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    ci95: float
    goes_on: bool

    @property
    def text(self) -> str:
        """The accuracy with its 95% interval, in percent."""
        margin = f" +- {100 * self.ci95:.2f}" if math.isfinite(self.ci95) else ""
        return f"{100 * self.accuracy:.2f}{margin}%"


class _State(BaseModel):
    """The content of ``state.json``."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    identity: dict[str, Any]
    values: dict[Annotated[int, Field(ge=0)], dict[str, Any]] = Field(default_factory=dict)
    reports: list[Report] = Field(default_factory=list)


_STATE = TypeAdapter(_State)


class Journal:
    """Takes all reports, decides, and writes each decision to disk before it answers.

    Args:
        folder: of the sweep.
        identity: the settings that decide the trials, by dotted key; they may not change.
        decide: the scheduler, which has seen nothing yet.
        echo: receives a line for each validation and each failure.
        require: raises an error if this process may no longer write.

    Raises:
        UserError: ``state.json`` is damaged, or of another identity.
    """

    def __init__(
        self,
        folder: Place,
        identity: Mapping[str, Any],
        decide: Decide,
        echo: Callable[[str], None] = lambda _line: None,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = folder / STATE_FILE
        self._decide, self._echo, self._require = decide, echo, require
        identity = json.loads(json.dumps(identity))
        known = exists(self._path)
        self._state = _read(self._path, identity) if known else _State(identity=identity)
        self.values = self._state.values
        """The values of each trial that has begun, by dotted key."""
        self.reports = self._state.reports
        """All reports, in their order."""
        self.failures: dict[int, str] = {}
        """Messages by trial; they are not on disk, so that a failed trial is tried again."""
        for report in self.reports:  # fills the scheduler's memory; the decisions stay
            decide(report.trial, report.step, report.accuracy)

    def begin(self, trial: int, values: dict[str, Any]) -> None:
        """Write down the values of a trial."""
        if trial not in self.values:
            self.values[trial] = values
            self._write()

    def report(self, trial: int, validation: Validation) -> bool:
        """Write down a validation, and return whether the trial goes on.

        A trial that was killed reports a validation again, and gets the same answer.
        """
        step, accuracy = validation.step, validation.accuracy
        for known in self.of(trial):
            if known.step == step:
                return known.goes_on
        goes_on = self._decide(trial, step, accuracy)
        report = Report(trial, step, accuracy, validation.ci95, goes_on)
        self.reports.append(report)
        self._write()
        end = "" if goes_on else "; the trial ends"
        self._echo(f"trial {trial}  step {step}  validation accuracy {report.text}{end}")
        return goes_on

    def fail(self, trial: int, problem: str) -> None:
        """Note that a trial cannot go on, and why."""
        self.failures[trial] = problem
        self._echo(f"trial {trial}  failed: {problem}")

    def of(self, trial: int) -> list[Report]:
        """Return the reports of one trial, in their order."""
        return [report for report in self.reports if report.trial == trial]

    def status(self, trial: int, num_steps: int) -> Status:
        """Return the status of a trial of ``num_steps`` outer steps."""
        reports = self.of(trial)
        if trial in self.failures:
            return "failed"
        if any(report.step >= num_steps for report in reports):
            return "done"
        return "begun" if all(report.goes_on for report in reports) else "stopped"

    def best(self, trial: int) -> Report | None:
        """Return the best report of a trial; of equal ones the first."""
        return max(self.of(trial), key=lambda report: report.accuracy, default=None)

    def _write(self) -> None:
        self._require()
        write_text(self._path, self._state.model_dump_json(indent=1) + "\n")


def _read(path: Place, identity: Mapping[str, Any]) -> _State:
    """Read the state of a sweep of this ``identity``."""
    name = "give the sweep another name"
    try:
        content = parse_json(read_bytes(path))
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{path}: has schema_version {shortened(found)}, this raymaml reads"
                f" {SCHEMA_VERSION}",
                remedy=f"use the raymaml that wrote it, or {name}",
            )
        state = checked(_STATE, content)
    except ValueError as error:
        remedy = f"restore it from a copy, or {name}"
        raise UserError(f"{path}: is damaged ({error})", remedy=remedy) from None
    with gathered() as mistakes:
        for key, (had, has) in differences(state.identity, identity).items():
            mistakes.add(
                f"{path.parent}: was started with {key} = {had!r}, the sweep now says {has!r}",
                f"give the old value to go on, or {name}",
            )
    return state
