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
from raymaml.bench.cases import Phase, with_steps
from raymaml.bench.contenders import EXACT_METHODS, OTHERS, Contender, why_not
from raymaml.bench.report import Row, number_of_cores
from raymaml.bench.worker import Detail, Results
from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.config.schema import Config
from raymaml.training.settings import local_device

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
        UserError: a name is unknown, or a number is invalid.
    """
    known = (*EXACT_METHODS, *OTHERS)
    chosen = known if names is None else tuple(dict.fromkeys(names.split(",")))
    texts = steps.split(",") if steps else []
    with gathered() as mistakes:
        for name in chosen:
            if name not in known:
                remedy = f"give some of {','.join(known)}"
                mistakes.add(f"--methods: {name!r} is unknown", remedy)
        for text in texts:
            if not re.fullmatch("[0-9]{1,5}", text):
                remedy = "give numbers below 100,000, such as 1,5,10"
                mistakes.add(f"--steps: {text!r} is no number of inner steps", remedy)
    return Effort(names=chosen, repeats=repeats, episodes=episodes, steps=[*map(int, texts)])


class Contestant:
    """A contender at ``config``, with its processes, which ``stack`` ends."""

    def __init__(self, row: Row, config: Config, device: torch.device, stack: ExitStack) -> None:
        context = get_context("spawn")
        prepare = worker.prepare, (context.Barrier(row.processes), device)
        self._pool = stack.enter_context(ProcessPoolExecutor(row.processes, context, *prepare))
        self._config, self._device = config, device
        self.row = row
        self.speeds: list[float] = []
        """Episodes/s in each round."""

    def measure(self, episodes: int, detail: Detail) -> tuple[Row, Results]:
        """Return the measurements of its slowest process."""
        args = (self.row, self._config, self._device, episodes, detail)
        calls = [self._pool.submit(worker.measure, *args) for _ in range(self.row.processes)]
        return min(
            (call.result() for call in calls), key=lambda found: found[0].episodes_per_second
        )

    def compare(self, first: Results) -> None:
        """Measure all but its speed; an empty ``first`` takes its results, to compare others."""
        row, results = self.measure(1, "results")
        first[:] = first or results
        float32, float64 = map(relative_difference, results, first)
        self.row = replace(row, difference=float32, difference_float64=float64)

    def take_turn(self, episodes: int) -> None:
        """Measure its speed once more."""
        self.speeds.append(self.measure(episodes, "speed")[0].episodes_per_second)


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
        UserError: the model cannot be built, or no contender is left.
    """
    device = local_device(config.cluster)
    contenders = list(_contenders(config, effort.names, device, echo))
    echo(f"{config.name}: one episode by each: {', '.join(row.name for row in contenders)}")
    trained = _race("training", contenders, config, effort, echo)
    if not trained:
        raise UserError(f"{config.name}: no contender is left; the lines above say why")
    fastest, num_steps = trained[0].method, config.test_inner.num_steps
    adapting = [  # raymaml's methods adapt alike: the fastest one stands for them
        replace(row, phase="evaluation", inner_steps=num_steps)
        for row in trained
        if row.processes == 1 and (row.library != "raymaml" or row.method == fastest)
    ]
    judged = _race("evaluation", adapting, config, effort, echo)
    rows = trained + [replace(row, method="adapt") for row in judged]
    return rows + _curve(config, trained, effort, device, echo)


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


def _race(
    phase: Phase, rows: Sequence[Row], config: Config, effort: Effort, echo: Echo
) -> list[Row]:
    """Return the filled rows of one phase: raymaml's from the fastest on, then the others."""
    device = local_device(config.cluster)
    with ExitStack() as stack:
        first: Results = []

        def entered(row: Row) -> list[Contestant]:
            alone = [Contestant(row, config, device, stack)]
            drop_failing(alone, lambda each: each.compare(first), echo)
            return alone

        def speed_of_ours(each: Contestant) -> float:
            return each.row.episodes_per_second if each.row.library == "raymaml" else 0.0

        everyone = [each for row in rows for each in entered(row)]
        everyone.sort(key=speed_of_ours, reverse=True)
        count = _whole_machine(config, device)
        if everyone and speed_of_ours(everyone[0]) and count > 1:
            # its fastest method alone: each process that waits holds 0.4 GiB of libraries
            everyone[1:1] = entered(replace(everyone[0].row, processes=count))
        for number in range(effort.repeats):
            echo(f"{phase}, round {number + 1} of {effort.repeats}")
            drop_failing(everyone, lambda each: each.take_turn(effort.episodes), echo)
        return [
            replace(each.row, episodes_per_second=statistics.median(each.speeds))
            for each in everyone
        ]


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
                lambda each: points.append(each.measure(effort.episodes, "memory")[0]),
                echo,
            )
        names = [each.row.option for each in everyone]
    return points
