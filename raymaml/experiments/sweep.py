"""A sweep: many training runs whose configs come from a space; a scheduler ends some early."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from raymaml.common.errors import StorageError, UserError, gathered
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.load import Changes, load_config, load_sweep, named_config
from raymaml.config.schema import Config
from raymaml.config.sweep import Asha, Dimension, SweepConfig
from raymaml.evaluation.campaign import Echo
from raymaml.experiments.journal import Decide, Journal
from raymaml.experiments.study import provide_data
from raymaml.seeding import bit_stream, uniform
from raymaml.storage.files import make_folder
from raymaml.storage.lease import hold
from raymaml.storage.place import Place
from raymaml.training.identity import flat
from raymaml.training.run import claim, open_run
from raymaml.training.session import Ask, EndedEarly, LocalSession
from raymaml.training.settings import local_device
from raymaml.training.worker import train_worker

MAX_PROBLEMS = 20
"""Maximum number of problems reported; a mistake in the space is one in each trial."""
DIGITS = 6
"""Significant digits of a drawn number: as it reads in a config, so it is."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: its values by dotted key, and the config of its run."""

    number: int
    values: dict[str, Any]
    config: Config


Propose = Callable[[int, Journal], dict[str, Any]]
"""Returns the values of a trial, given all that is known of the others."""
Runner = Callable[["Sweep", Iterator[Trial], Journal], None]
"""Runs trials until they are done, stopped or failed; raises KeyboardInterrupt at Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file with the configs that it makes."""

    settings: SweepConfig
    base: Config
    place: Place
    """The config that all trials start from, with..."""
    layers: tuple[Changes | Sequence[str], ...]
    """...these changes."""
    origin: str
    """The sweep file, as messages name it."""
    checked: tuple[Trial, ...] = ()
    """All trials; where a search proposes them, the edges of the space."""

    @property
    def folder(self) -> Place:
        """The folder of state and report, and of the run folders of the trials."""
        return self.base.run_dir / "sweeps" / self.base.name / self.settings.name

    @property
    def max_steps(self) -> int:
        """Outer steps of the longest trial."""
        return max((trial.config.outer.num_steps for trial in self.checked), default=0)

    @property
    def first_rung(self) -> int | None:
        """Outer step at which the first trials may end; None: all trials go on to their ends."""
        asha = self.settings.scheduler
        if not isinstance(asha, Asha):
            return None
        return asha.grace_steps or self.base.outer.validate_every

    def trial(self, number: int, values: dict[str, Any]) -> Trial:
        """Return a trial with its config.

        Raises:
            UserError: with every problem of the config.
        """
        own = {
            "name": run_name(number),
            "run_dir": str(self.folder),
            "cluster.num_workers": self.settings.workers_per_trial,
        }
        drawn = Changes(f"{self.origin}: space", values)
        config = load_config(self.place, *self.layers, drawn, Changes(self.origin, own))
        return Trial(number=number, values=values, config=config)

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change while a sweep goes on, by dotted key."""
        own = self.settings.model_dump(include={"seed", "space", "search", "scheduler"})
        steps = self.base.outer.model_dump(include={"num_steps", "validate_every"})
        return {
            **{f"sweep.{key}": value for key, value in own.items()},
            **{f"outer.{key}": value for key, value in steps.items()},
            **flat(self.base.learning),
            **flat(self.base.validating),
        }


def run_name(trial: int) -> str:
    """Return the name of a trial's run."""
    return f"trial-{trial:05d}"


def read_sweep(
    path: Place, overrides: Sequence[str] = (), config_path: Place | None = None
) -> Sweep:
    """Read a sweep file, and check the config of every trial, or of every edge of a search.

    Args:
        path: the sweep file.
        overrides: change the config of all trials, after the file's own ``set``.
        config_path: the config that all start from instead of the one that the file names.

    Raises:
        UserError: with every problem of any of them.
    """
    settings = load_sweep(path)
    place = named_config(path, settings.config) if config_path is None else config_path
    layers = (Changes(f"{path}: set", settings.set), overrides)
    sweep = Sweep(
        settings=settings,
        base=load_config(place, *layers),
        place=place,
        layers=layers,
        origin=str(path),
    )
    drawn = (draw_values(settings, number) for number in range(settings.count))
    trials: list[Trial] = []
    with gathered() as mistakes:
        for number, values in enumerate(edges(settings) if settings.search == "optuna" else drawn):
            with mistakes.kept():
                trials.append(sweep.trial(number, values))
            if len(set(mistakes)) >= MAX_PROBLEMS:
                raise UserError(f"{path}: there may be more, in trials after {number}")
        sweep = replace(sweep, checked=tuple(trials))
        mistakes.extend(_rung_problems(sweep))
    return sweep


def _rung_problems(sweep: Sweep) -> Iterator[str]:
    """Trials are compared at validations: the first rung must be one before the end."""
    rung, every = sweep.first_rung, sweep.base.outer.validate_every
    grace = f"{sweep.origin}: scheduler.grace_steps is {rung}; it must be"
    if rung is not None and rung % every:
        yield f"{grace} a multiple of outer.validate_every, {every}, where trials are compared"
    if rung is not None and rung >= sweep.max_steps > 0:
        yield f"{grace} below outer.num_steps, {sweep.max_steps}, or nothing is ever compared"


def draw_values(settings: SweepConfig, trial: int) -> dict[str, Any]:
    """Return the values of one trial by dotted key, a function of seed, trial and key.

    Every key has a stream of its own: another key, or more trials, change nothing (contract 4).
    """
    turn = trial % settings.grid_size
    values = {}
    for key, dimension in settings.space.items():
        if dimension.grid is not None:
            turn, place = divmod(turn, len(dimension.grid))
            values[key] = dimension.grid[place]
        else:
            bits = bit_stream(settings.seed, "sweep", "draw", trial, key)
            values[key] = draw(dimension, float(uniform(bits, 1)[0]))
    return values


def draw(dimension: Dimension, unit: float) -> Any:
    """Return the value at ``unit`` (0 <= unit < 1) of a dimension."""
    if dimension.integer is not None:
        low, high = dimension.integer
        return low + int(unit * (high - low + 1))
    if dimension.bounds is None:
        return dimension.values[int(unit * len(dimension.values))]
    start, end = dimension.bounds
    if dimension.log_uniform is None:
        value = start + unit * (end - start)
    else:
        value = math.exp(math.log(start) + unit * (math.log(end) - math.log(start)))
    return min(max(float(f"{value:.{DIGITS}g}"), start), end)


def edges(settings: SweepConfig) -> Iterator[dict[str, Any]]:
    """Yield trial 0's values with one key at a bound, or at one value of its list."""
    first = draw_values(settings, 0)
    for key, dimension in settings.space.items():
        for value in dimension.bounds or dimension.values:
            yield first | {key: value}


def run_sweep(
    sweep: Sweep, *, runner: Runner, decide: Decide, propose: Propose, echo: Echo
) -> Place:
    """Run all trials that are not over, write the report, and export the best checkpoint.

    Returns:
        The path of ``sweep.json``.

    Raises:
        UserError: another process runs the sweep, or data or models do not fit.
        KeyboardInterrupt: Ctrl-C; all finished work is kept.
    """
    from raymaml.experiments.sweep_report import write_sweep_report

    provide_data(sweep.base.data, sweep.base.episodes, echo)
    make_folder(sweep.folder, "run_dir")
    what = f"{sweep.folder}: another process runs this sweep"
    taken = UserError(what, remedy="wait for it, or stop it")
    with hold(sweep.folder / ".lock", taken=taken) as require_held:
        journal = Journal(sweep.folder, sweep.identity(), decide, echo, require_held)
        _check_trials(sweep)
        trials = _unfinished(sweep, journal, propose)
        if (first := next(trials, None)) is not None:
            runner(sweep, itertools.chain([first], trials), journal)
        return write_sweep_report(sweep, journal, echo)


def _check_trials(sweep: Sweep) -> None:
    """Check every trial's data, model and run folder, before any of them starts."""
    with gathered() as mistakes:
        for trial in sweep.checked:
            with mistakes.kept(trial.config.name):
                run = open_run(trial.config, torch.device("cpu"))
                if sweep.settings.search == "random":  # else it is an edge, and no trial
                    with claim(run):
                        pass


def _unfinished(sweep: Sweep, journal: Journal, propose: Propose) -> Iterator[Trial]:
    """Yield the trials that are to be run, each with its values once it is asked for."""
    for number in range(sweep.settings.count):
        values = journal.values.get(number) or propose(number, journal)
        journal.begin(number, values)
        try:
            trial = sweep.trial(number, values)
        except UserError as error:
            journal.fail(number, "; ".join(error.problems))
            continue
        if journal.status(number, trial.config.outer.num_steps) == "begun":
            yield trial


def train_alone(config: Config, device: torch.device, ask: Ask, stop: Callable[[], bool]) -> None:
    """Train a trial in this process, from its last checkpoint on.

    Args:
        config: the trial's.
        device: the device to learn on.
        ask: called with each validation; returns whether the trial goes on.
        stop: called at every outer step; the run is saved there, and ends, when it is true.

    Raises:
        UserError: data do not fit, a loss is not finite, or another process writes the run.
    """
    run = open_run(config, device)
    session = LocalSession(run.data, device, ask, stop)
    make_folder(run.folder, "run_dir")
    with contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None)


def run_in_order(sweep: Sweep, trials: Iterator[Trial], journal: Journal) -> None:
    """Run the trials in this process, in their order, without Ray."""
    stop = threading.Event()
    with on_interrupt(stop.set, sweep.base.cluster.grace_seconds):
        for trial in trials:
            device = local_device(trial.config.cluster)
            try:
                train_alone(
                    trial.config, device, partial(journal.report, trial.number), stop.is_set
                )
            except StorageError:  # not a fault of the trial
                raise
            except UserError as error:
                journal.fail(trial.number, "; ".join(error.problems))
            if stop.is_set():
                raise stopped()
