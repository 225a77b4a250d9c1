"""Measuring the contenders of one configuration in turn, each in processes of its own."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch

from raymaml.bench import worker
from raymaml.bench.contenders import EXACT_METHODS, OTHERS, Contender, why_not
from raymaml.bench.report import Row, number_of_cores
from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.config.schema import Config
from raymaml.training.settings import local_device

Echo = Callable[[str], None]
ON_GPU = [1, 16, 64]
"""Episodes at once on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    names: Sequence[str]
    """Contenders: of ``contenders.EXACT_METHODS`` and ``contenders.OTHERS``."""
    repeats: int
    """Number of rounds; each contender has a turn in each."""
    episodes: int
    """Number of timed computations in a turn of a process, each of one episode, or of several."""
    steps: Sequence[int]
    """Numbers of inner steps of the curve."""
    at_once: Sequence[int] | None
    """Numbers of episodes at once; None: 1, on a GPU also 16 and 64."""


def effort(
    names: str | None, steps: str, repeats: int, episodes: int, at_once: str | None = None
) -> Effort:
    """Read the options of the command; commas separate ``names``, ``steps`` and ``at_once``.

    Raises:
        UserError: a name is unknown, or a number is invalid.
    """
    known = (*EXACT_METHODS, *OTHERS)
    chosen = known if names is None else tuple(dict.fromkeys(names.split(",")))
    texts = steps.split(",") if steps else []
    counts = at_once.split(",") if at_once else []
    with gathered() as mistakes:
        for text in counts:
            if not re.fullmatch("[1-9][0-9]{0,4}", text):
                remedy = "give numbers from 1 to 99,999, such as 1,16,64"
                mistakes.add(f"--at-once: {text!r} is no number of episodes", remedy)
        for name in chosen:
            if name not in known:
                remedy = f"give some of {','.join(known)}"
                mistakes.add(f"--methods: {name!r} is unknown", remedy)
        for text in texts:
            if not re.fullmatch("[0-9]{1,5}", text):
                remedy = "give numbers below 100,000, such as 1,5,10"
                mistakes.add(f"--steps: {text!r} is no number of inner steps", remedy)
    return Effort(
        names=chosen,
        repeats=repeats,
        episodes=episodes,
        steps=[*map(int, texts)],
        at_once=[*map(int, counts)] or None,
    )


class Contestant:
    """A row of the table, and the processes that measure it, which ``stack`` ends."""

    def __init__(self, row: Row, config: Config, stack: ExitStack) -> None:
        context = get_context("spawn")
        setup = worker.prepare, (context.Barrier(row.processes), row, config)
        self._pool = stack.enter_context(ProcessPoolExecutor(row.processes, context, *setup))
        self.row = row
        self.speeds: list[float] = []
        """Episodes/s in each round."""

    def measure(self, episodes: int, detail: worker.Detail) -> tuple[Row, worker.Results]:
        """Return the measurements of its slowest process."""
        jobs = [
            self._pool.submit(worker.measure, episodes, detail) for _ in range(self.row.processes)
        ]
        return min((job.result() for job in jobs), key=lambda found: found[0].episodes_per_second)

    def compare(self, first: worker.Results) -> None:
        """Measure all but its speed; an empty ``first`` takes its results, to compare others."""
        row, results = self.measure(1, "results")
        first[:] = first or results
        float32, float64 = (  # the largest entry of the difference, over the largest of the first
            float(np.abs(value - reference).max()) / (float(np.abs(reference).max()) or 1.0)
            for value, reference in zip(results, first, strict=True)
        )
        self.row = replace(row, difference=float32, difference_float64=float64)


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
    contenders = list(_contenders(config, effort, echo))
    echo(f"{config.name}: one episode by each: {', '.join(row.name for row in contenders)}")
    trained = _race(contenders, config, effort, echo)
    if not trained:
        raise UserError(f"{config.name}: no contender is left; the lines above say why")
    fastest, num_steps = trained[0].method, config.test_inner.num_steps
    adapting = [  # raymaml's methods adapt alike: the fastest one stands for them
        replace(row, phase="evaluation", inner_steps=num_steps)
        for row in trained
        if row.library != "raymaml" or (row.processes == 1 and row.method == fastest)
    ]
    judged = _race(adapting, config, effort, echo)
    rows = trained + [replace(row, method="adapt") for row in judged]
    return rows + _curve(config, trained, effort, echo)


def _contenders(config: Config, effort: Effort, echo: Echo) -> Iterator[Row]:
    """Yield an empty row for each contender that can compute the episode.

    raymaml has its own number of threads. Another library may be at its best with any of several,
    or in as many processes as raymaml trains with.
    """
    ours = {(1, config.cluster.threads_per_worker)}
    others = {(1, threads) for threads in (1, torch.get_num_threads(), number_of_cores())}
    others |= ours | {(_whole_machine(config), 1)}
    on_cpu = local_device(config.cluster).type == "cpu"
    model = Contender("raymaml", "unrolled", config=config, device=torch.device("cpu")).model
    counts = effort.at_once or ([1] if on_cpu else ON_GPU)
    for name in effort.names:
        library, method = ("raymaml", name) if name in EXACT_METHODS else (name, "unrolled")
        if library != "raymaml" and (reason := why_not(name, config, model)):
            echo(f"  {name}: left out: {reason}")
            continue
        for processes, threads in sorted(others if library != "raymaml" and on_cpu else ours):
            row = Row(
                config=config.name,
                phase="training",
                library=library,
                method=method,
                processes=processes,
                threads=threads,
                inner_steps=config.inner.num_steps,
            )
            together = counts if library in {"raymaml", "plain"} else [1]
            for count, graph in itertools.product(together, [False, True]):
                if not graph or (count > 1 and not on_cpu):
                    yield replace(row, at_once=count, graph=graph)


def _race(rows: Sequence[Row], config: Config, effort: Effort, echo: Echo) -> list[Row]:
    """Return the rows of one phase, filled in: raymaml's from the fastest on, then the others."""
    with ExitStack() as stack:
        first: worker.Results = []

        def entered(row: Row) -> list[Contestant]:
            alone = [Contestant(row, config, stack)]
            drop_failing(alone, lambda each: each.compare(first), echo)
            return alone

        def speed_of_ours(each: Contestant) -> float:
            return each.row.episodes_per_second if each.row.library == "raymaml" else 0.0

        def take_turn(each: Contestant) -> None:
            each.speeds.append(each.measure(effort.episodes, "speed")[0].episodes_per_second)

        everyone = [each for row in rows for each in entered(row)]
        everyone.sort(key=speed_of_ours, reverse=True)
        count = _whole_machine(config)
        if everyone and speed_of_ours(everyone[0]) and count > 1:
            # its fastest method alone: each process that waits holds 0.4 GiB of libraries
            everyone[1:1] = entered(replace(everyone[0].row, processes=count))
        for number in range(effort.repeats if everyone else 0):
            echo(f"{rows[0].phase}, round {number + 1} of {effort.repeats}")
            drop_failing(everyone, take_turn, echo)
        return [
            replace(each.row, episodes_per_second=statistics.median(each.speeds))
            for each in everyone
        ]


def _whole_machine(config: Config) -> int:
    """Return the number of processes that raymaml trains with on this machine."""
    if local_device(config.cluster).type != "cpu":
        return 1
    if config.cluster.num_workers != "auto":
        return config.cluster.num_workers
    return max(1, number_of_cores() // config.cluster.threads_per_worker)


def _curve(config: Config, rows: Sequence[Row], effort: Effort, echo: Echo) -> list[Row]:
    """Measure raymaml's methods, and plain, once at each other number of inner steps.

    A contender that fails, for instance for lack of memory, is left out from there on.
    """
    threads = config.cluster.threads_per_worker
    followed = [row for row in rows if row.on_the_curve and row.threads == threads]
    points: list[Row] = []

    def add_point(each: Contestant) -> None:
        row, _ = each.measure(effort.episodes, "memory")
        points.append(replace(row, aten_calls=None, difference=None, difference_float64=None))

    for num_steps in sorted(set(effort.steps) - {config.inner.num_steps}):
        echo(f"{config.name}: inner steps: {num_steps}")
        inner = config.inner.model_copy(update={"num_steps": num_steps})
        at = config.model_copy(update={"inner": inner})
        with ExitStack() as stack:
            everyone = [
                Contestant(replace(row, inner_steps=num_steps), at, stack) for row in followed
            ]
            drop_failing(everyone, add_point, echo)
        followed = [each.row for each in everyone]
    return points
