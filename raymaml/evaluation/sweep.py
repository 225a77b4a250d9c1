"""A sweep: trials whose configs are drawn, each a training run; some end early by a scheduler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from raymaml.common.errors import UserError
from raymaml.common.untrusted import json_text
from raymaml.config.load import Changes, load_config, load_sweep, named_config
from raymaml.config.schema import Config, learning_fingerprint
from raymaml.config.sweep import Asha, Pbt, SweepConfig
from raymaml.evaluation.campaign import Echo
from raymaml.evaluation.population import Exploit, comparisons, donors
from raymaml.evaluation.referee import Decide, Referee, run_name
from raymaml.evaluation.search_space import draw_values, perturb
from raymaml.evaluation.study import provide_data
from raymaml.storage.files import make_folder, write_text
from raymaml.storage.lease import hold
from raymaml.storage.place import Place
from raymaml.training.card import LINEAGE_FILE
from raymaml.training.checkpoint import copy_for_going_on
from raymaml.training.identity import judging
from raymaml.training.run import open_run
from raymaml.training.run_folder import claim

MOST_PROBLEMS = 20
"""Of a sweep's trials that are told at once; a mistake in the space is one in each of them."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial as it stands: its run and the values that it differs by."""

    number: int
    values: dict[str, Any]
    config: Config


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A trial that is to run up to an outer step."""

    trial: int
    config: Config
    until: int


RunLegs = Callable[[Sequence[Leg], Referee], None]
"""Runs the legs, each until it is done, stopped or failed; raises KeyboardInterrupt at Ctrl-C."""
Runner = Callable[["Sweep"], contextlib.AbstractContextManager[RunLegs]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file with the configs that it makes."""

    settings: SweepConfig
    base: Config
    place: Place
    """The config that all start from, with..."""
    layers: tuple[Changes | Sequence[str], ...]
    """...these changes."""
    origin: str
    """The sweep file, as messages name it."""
    trials: tuple[Trial, ...] = ()

    @property
    def folder(self) -> Place:
        """Where state and report are written; the run folders of the trials lie in it."""
        return self.base.run_dir / "sweeps" / self.base.name / self.settings.name

    def trial(self, number: int, values: dict[str, Any], run: str) -> Trial:
        """Return a trial with its config.

        Raises:
            UserError: with every problem of the config.
        """
        own = {
            "name": run,
            "run_dir": str(self.folder),
            "cluster.num_workers": self.settings.workers_per_trial,
        }
        drawn = Changes(f"{self.origin}: space", values)
        config = load_config(self.place, *self.layers, drawn, Changes(self.origin, own))
        return Trial(number=number, values=values, config=config)

    def decides_by(self) -> dict[str, Any]:
        """Return what may not change between the beginning of a sweep and its continuation."""
        settings = self.settings.model_dump(mode="json")
        learning = learning_fingerprint(self.base)
        same = {key: settings[key] for key in ("seed", "space", "scheduler")}
        same |= {f"config.{key}": value for key, value in learning.items()}
        same["validation"] = judging(self.base)
        same["outer.num_steps"] = self.base.outer.num_steps
        same["outer.validate_every"] = self.base.outer.validate_every
        if isinstance(self.settings.scheduler, Pbt):  # who is replaced depends on all
            same["num_trials"] = self.settings.count
        return same


def read_sweep(
    path: Place, overrides: Sequence[str] = (), config_path: Place | None = None
) -> Sweep:
    """Read a sweep file, draw its trials, and check every config.

    Args:
        path: the sweep file.
        overrides: change the config of all trials, after the file's own ``set``.
        config_path: what all start from instead of the config that the file names.

    Raises:
        UserError: with every problem of any of them.
    """
    settings = load_sweep(path)
    place = named_config(path, settings.config) if config_path is None else config_path
    layers = (Changes(f"{path}: set", settings.set), overrides)
    base = load_config(place, *layers)
    sweep = Sweep(settings=settings, base=base, place=place, layers=layers, origin=str(path))
    trials: list[Trial] = []
    problems: list[str] = []
    for number in range(settings.count):
        try:
            values = draw_values(settings, number)
            trials.append(sweep.trial(number, values, run_name(number)))
        except UserError as error:
            problems.extend(error.problems)
        if len(problems) >= MOST_PROBLEMS:
            raise UserError(*problems, f"{path}: there may be more, in trials after {number}")
    problems += _problems_of_rhythm(sweep, [trial.config for trial in trials])
    if problems:
        raise UserError(*problems)
    return replace(sweep, trials=tuple(trials))


def max_steps(sweep: Sweep) -> int:
    """Return the outer steps of the longest trial."""
    return max(trial.config.outer.num_steps for trial in sweep.trials)


def first_rung(sweep: Sweep, asha: Asha) -> int:
    """Return the outer step at which the first trials may be stopped."""
    every = sweep.base.outer.validate_every
    return every if asha.grace_steps is None else asha.grace_steps


def _problems_of_rhythm(sweep: Sweep, configs: list[Config]) -> Iterator[str]:
    """Schedulers decide at validations: what they count in must be made of those."""
    scheduler, every = sweep.settings.scheduler, sweep.base.outer.validate_every
    longest = max((config.outer.num_steps for config in configs), default=0)
    named = {}
    if isinstance(scheduler, Asha):
        named = {"grace_steps": first_rung(sweep, scheduler)}
    if isinstance(scheduler, Pbt):
        named = {"perturb_every": scheduler.perturb_every}
    for key, value in named.items():
        if value % every:
            yield (
                f"{sweep.origin}: scheduler.{key} is {value}; it must be a multiple of"
                f" outer.validate_every, {every}, where trials are compared"
            )
        if configs and value >= longest:
            yield (
                f"{sweep.origin}: scheduler.{key} is {value}; it must be below outer.num_steps,"
                f" {longest}, or nothing is ever compared"
            )


def run_sweep(
    sweep: Sweep, *, runner: Runner, decide: Callable[[Sweep], Decide], echo: Echo
) -> Place:
    """Run all trials that are not over, write the report, and export the best checkpoint.

    Returns:
        The path of ``sweep.json``.

    Raises:
        UserError: another process runs the sweep, or data or models do not fit.
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    from raymaml.evaluation.sweep_progress import SweepProgress
    from raymaml.evaluation.sweep_report import write_sweep_report

    provide_data(sweep.base, echo)
    with _sole_driver(sweep.folder) as require_held:
        referee = Referee(sweep.folder, sweep.decides_by(), decide(sweep), require_held)
        _check_trials(sweep)
        exploits: list[Exploit] = []
        with contextlib.ExitStack() as stack:
            run: RunLegs | None = None
            for legs in _rounds(sweep, referee, exploits):
                if not legs:
                    continue
                if run is None:
                    run = stack.enter_context(runner(sweep))
                    progress = stack.enter_context(SweepProgress(sweep, referee, exploits, echo))
                    referee.watch = progress.show
                run(legs, referee)
        return write_sweep_report(sweep, referee, exploits, echo)


@contextlib.contextmanager
def _sole_driver(folder: Place) -> Iterator[Callable[[], None]]:
    make_folder(folder, "run_dir")
    taken = UserError(
        f"{folder}: another process runs this sweep", remedy="wait for it, or stop it"
    )
    with hold(folder / ".lock", taken=taken) as require_held:
        yield require_held


def _check_trials(sweep: Sweep) -> None:
    """Check every trial's data, model and run folder, before any of them starts."""
    problems: list[str] = []
    for trial in sweep.trials:
        try:
            with claim(open_run(trial.config, torch.device("cpu"))):
                pass
        except UserError as error:
            problems.extend(f"{run_name(trial.number)}: {each}" for each in error.problems)
    if problems:
        raise UserError(*problems)


def _rounds(sweep: Sweep, referee: Referee, exploits: list[Exploit]) -> Iterator[list[Leg]]:
    """Yield what can run at once; the next such when that is done."""
    if isinstance(sweep.settings.scheduler, Pbt):
        yield from _generations(sweep, sweep.settings.scheduler, referee, exploits)
        return
    for number in list(referee.failures):
        referee.forgive(number)
    yield [
        Leg(trial=trial.number, config=trial.config, until=trial.config.outer.num_steps)
        for trial in sweep.trials
        if referee.status(trial.number, trial.config.outer.num_steps) in {"waiting", "running"}
    ]


def _generations(
    sweep: Sweep, pbt: Pbt, referee: Referee, exploits: list[Exploit]
) -> Iterator[list[Leg]]:
    """Yield the legs between two comparisons, and let the worst trials go on as the best.

    All of it follows from the reports, so that a sweep that is run again comes to where it was; a
    trial that failed stays out, since those after it were compared without it.
    """
    num_steps = sweep.base.outer.num_steps
    trials = {trial.number: trial for trial in sweep.trials}
    for step in comparisons(pbt, num_steps):
        yield [
            Leg(trial=number, config=trial.config, until=step)
            for number, trial in trials.items()
            if number not in referee.failures and _accuracy(referee, number, step) is None
        ]
        found = {number: _accuracy(referee, number, step) for number in trials}
        reached = {number: value for number, value in found.items() if value is not None}
        trials = {number: trials[number] for number in reached}
        if step < num_steps:
            chosen = donors(reached, pbt, seed=sweep.settings.seed, step=step)
            new = {
                number: _exploit(sweep, pbt, (trials[number], trials[donor]), reached, step)
                for number, donor in chosen.items()
            }
            trials |= {number: trial for number, (trial, _) in new.items()}
            exploits += [exploit for _, exploit in new.values()]
            lineage = json_text([asdict(exploit) for exploit in exploits], indent=2)
            write_text(sweep.folder / LINEAGE_FILE, lineage + "\n")


def _accuracy(referee: Referee, trial: int, step: int) -> float | None:
    found = [report.accuracy for report in referee.of(trial) if report.step == step]
    return found[0] if found else None


def _exploit(
    sweep: Sweep, pbt: Pbt, pair: tuple[Trial, Trial], accuracies: dict[int, float], step: int
) -> tuple[Trial, Exploit]:
    """Make the run folder in which a trial goes on from the checkpoints of its donor."""
    trial, donor = pair
    values = perturb(sweep.settings, pbt, donor.values, trial=trial.number, step=step)
    new = sweep.trial(trial.number, values, run_name(trial.number, step))
    copy_for_going_on(donor.config.run_folder, new.config.run_folder, step)
    exploit = Exploit(
        step=step,
        trial=trial.number,
        accuracy=accuracies[trial.number],
        donor=donor.number,
        donor_run=donor.config.name,
        donor_accuracy=accuracies[donor.number],
        run=new.config.name,
        values=values,
    )
    text = json_text(asdict(exploit), indent=2) + "\n"
    write_text(new.config.run_folder / LINEAGE_FILE, text)
    return new, exploit
