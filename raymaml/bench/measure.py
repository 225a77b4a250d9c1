"""Measuring the contenders of one configuration in turn, each in processes of its own."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymaml.bench import worker
from raymaml.bench.cases import PHASES, Phase, with_steps
from raymaml.bench.contenders import EXACT_METHODS, OTHERS, Contender, why_not
from raymaml.bench.report import Row, number_of_cores
from raymaml.bench.worker import Detail, Results
from raymaml.common.errors import UserError, reason_of
from raymaml.config.schema import Config
from raymaml.training.session import local_device

Echo = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    names: Sequence[str]
    """Contenders: of ``contenders.EXACT_METHODS`` and ``contenders.OTHERS``."""
    repeats: int
    """Number of rounds; each contender has a turn in each."""
    episodes: int
    """Number of timed episodes in a turn of a process."""
    steps: Sequence[int]
    """Numbers of inner steps of the curve."""


def effort(names: str | None, steps: str, repeats: int, episodes: int) -> Effort:
    """Read the options of the command; commas separate ``names`` and ``steps``.

    Raises:
        UserError: A name is unknown, or a number is invalid.
    """
    known = (*EXACT_METHODS, *OTHERS)
    chosen = known if names is None else tuple(dict.fromkeys(names.split(",")))
    texts = steps.split(",") if steps else []
    problems = [
        f"--methods: {name!r} is unknown; give some of {','.join(known)}"
        for name in chosen
        if name not in known
    ] + [
        f"--steps: {text!r} is no number of inner steps; give numbers below 100,000, such as 1,5,10"
        for text in texts
        if not re.fullmatch("[0-9]{1,5}", text)
    ]
    if problems:
        raise UserError(*problems)
    return Effort(names=chosen, repeats=repeats, episodes=episodes, steps=[*map(int, texts)])


class Contestant:
    """A contender at ``config``, with its processes, which ``stack`` ends."""

    def __init__(self, row: Row, config: Config, device: torch.device, stack: ExitStack) -> None:
        context = get_context("spawn")
        begin = worker.begin, (context.Barrier(row.processes), device)
        self._pool = stack.enter_context(ProcessPoolExecutor(row.processes, context, *begin))
        self._config, self._device = config, device
        adapt = replace(row, phase="evaluation", inner_steps=config.test_inner.num_steps)
        self.rows: dict[Phase, Row] = {"training": row, "evaluation": adapt}
        """What is known of it."""
        self.speeds: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
        """Episodes/s in each round."""

    @property
    def row(self) -> Row:
        """Its row in training."""
        return self.rows["training"]

    @property
    def ours(self) -> bool:
        """Whether it is a method of raymaml."""
        return self.row.library == "raymaml"

    def measure(self, phase: Phase, episodes: int, detail: Detail) -> tuple[Row, Results]:
        """Return what its slowest process measured."""
        args = (self.rows[phase], self._config, self._device, episodes, detail)
        calls = [self._pool.submit(worker.measure, *args) for _ in range(self.row.processes)]
        return min(
            (call.result() for call in calls), key=lambda found: found[0].episodes_per_second
        )


def drop_failing(
    everyone: list[Contestant], act: Callable[[Contestant], object], echo: Echo
) -> None:
    """Act on each contestant; remove those that fail from the list, with a line."""
    for each in list(everyone):
        try:
            act(each)
            continue
        except BrokenProcessPool:
            reason = "its process was ended, as the system does when memory runs out"
        except Exception as error:  # of any library
            reason = reason_of(error)
        echo(f"  {each.row.name}: left out from here on: {reason}")
        everyone.remove(each)


def measure(config: Config, effort: Effort, echo: Echo) -> list[Row]:
    """Compare and time all contenders at ``config``, and follow some over the inner steps.

    Raises:
        UserError: The model cannot be built, or no contender is left.
    """
    device = local_device(config.cluster)
    rows = list(_contenders(config, effort.names, device, echo))
    echo(f"{config.name}: one episode by each: {', '.join(row.name for row in rows)}")
    with ExitStack() as stack:
        everyone = [Contestant(row, config, device, stack) for row in rows]
        first: dict[Phase, Results] = {}
        drop_failing(everyone, lambda each: _compare(each, first), echo)
        everyone.sort(key=lambda each: -each.row.episodes_per_second if each.ours else 0.0)
        count = _whole_machine(config, device)
        if everyone and everyone[0].ours and count > 1:
            # raymaml's fastest method alone: each process that waits holds 0.4 GiB of libraries
            row = replace(everyone[0].row, processes=count)
            team = [Contestant(row, config, device, stack)]
            drop_failing(team, lambda each: _compare(each, first), echo)
            everyone[1:1] = team
        for phase in PHASES:
            _time_in_turn(everyone, phase, effort, echo)
        rows = [
            replace(
                each.rows[phase],
                method=each.row.method if phase == "training" else "adapt",
                episodes_per_second=statistics.median(each.speeds[phase]),
            )
            for phase in PHASES
            for each in everyone
            if each.speeds[phase]
        ]
    if not rows:
        raise UserError(f"{config.name}: no contender is left; the lines above say why")
    return rows + _curve(config, rows, effort, device, echo)


def _contenders(
    config: Config, names: Sequence[str], device: torch.device, echo: Echo
) -> Iterator[Row]:
    """Yield an empty row for each contender that can compute the episode.

    raymaml has its own number of threads; another library may be at its best with any of several.
    """
    ours = {config.cluster.threads_per_worker}
    others = ours | {1, torch.get_num_threads(), number_of_cores()}
    model = Contender("raymaml", "unrolled", config=config, device=torch.device("cpu")).model
    for name in names:
        library, method = ("raymaml", name) if name in EXACT_METHODS else (name, "unrolled")
        if library != "raymaml" and (reason := why_not(name, config, model)):
            echo(f"  {name}: left out: {reason}")
            continue
        for threads in sorted(ours if library == "raymaml" or device.type != "cpu" else others):
            yield Row(
                config=config.name,
                phase="training",
                library=library,
                method=method,
                threads=threads,
                inner_steps=config.inner.num_steps,
            )


def _compare(each: Contestant, first: dict[Phase, Results]) -> None:
    """Fill in its memory, operators, and differences from the results of the first contestant."""
    for phase in PHASES:
        row, results = each.measure(phase, 1, "results")
        float32, float64 = map(relative_difference, results, first.setdefault(phase, results))
        each.rows[phase] = replace(row, difference=float32, difference_float64=float64)


def relative_difference(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the largest entry of the difference, divided by the largest of ``reference``."""
    return float(np.abs(value - reference).max()) / (float(np.abs(reference).max()) or 1.0)


def _whole_machine(config: Config, device: torch.device) -> int:
    """Return the number of processes that raymaml trains with on this machine."""
    if device.type != "cpu":
        return 1
    if config.cluster.num_workers != "auto":
        return config.cluster.num_workers
    return max(1, number_of_cores() // config.cluster.threads_per_worker)


def _time_in_turn(everyone: list[Contestant], phase: Phase, effort: Effort, echo: Echo) -> None:
    """Give each contender a turn in each round.

    raymaml's methods adapt alike: in evaluation the fastest one stands for them.
    """
    fastest = [each.row.method for each in everyone[:1]]

    def take_turn(each: Contestant) -> None:
        if phase == "training" or not each.ours or each.row.method in fastest:
            row, _ = each.measure(phase, effort.episodes, "speed")
            each.speeds[phase].append(row.episodes_per_second)

    for number in range(effort.repeats):
        echo(f"{phase}, round {number + 1} of {effort.repeats}")
        drop_failing(everyone, take_turn, echo)


def _curve(
    config: Config, rows: Sequence[Row], effort: Effort, device: torch.device, echo: Echo
) -> list[Row]:
    """Measure raymaml's methods, and plain, once at each other number of inner steps.

    A contender that fails, for instance for lack of memory, is left out from there on.
    """
    threads, points = config.cluster.threads_per_worker, list[Row]()
    names = [row.option for row in rows if row.on_the_curve and row.threads == threads]
    for num_steps in sorted(set(effort.steps) - {config.inner.num_steps}):
        echo(f"{config.name}: inner steps: {num_steps}")
        at = with_steps(config, num_steps)
        with ExitStack() as stack:
            everyone = [
                Contestant(row, at, device, stack)
                for row in _contenders(at, names, device, echo)
                if row.threads == threads
            ]
            drop_failing(
                everyone,
                lambda each: points.append(each.measure("training", effort.episodes, "memory")[0]),
                echo,
            )
        names = [each.row.option for each in everyone]
    return points
