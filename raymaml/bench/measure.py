"""Measuring the contenders of one configuration, in turn."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

import torch

from raymaml.bench.cases import PHASES, Phase
from raymaml.bench.children import Child
from raymaml.bench.contest import (
    Contestant,
    Echo,
    compare,
    contest,
    drop_failing,
)
from raymaml.bench.curve import measure_curve
from raymaml.bench.rows import Row
from raymaml.config.schema import Config
from raymaml.training.session import local_device


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    names: tuple[str, ...]
    """Who takes part: of ``contenders.EXACT_METHODS`` and ``contenders.OTHERS``."""
    repeats: int
    """Rounds, in each of which everybody has a turn."""
    episodes: int
    """On the clock in one turn of a process."""
    steps: tuple[int, ...]
    """Inner steps of the curve."""


def measure(config: Config, effort: Effort, echo: Echo) -> list[Row]:
    """Compare and time all contenders at ``config``, and follow some over the inner steps.

    Raises:
        UserError: the model cannot be built, two contenders disagree, or none is left.
    """
    device = local_device(config.cluster)
    echo(f"{config.name}: starting the contenders, each in a process of its own")
    with contest(config, effort.names, thread_counts(config, device), device, echo) as everyone:
        names = ", ".join(each.name for each in everyone)
        echo(f"{config.name}: do they compute the same? {names}")
        compare(config, everyone, echo)
        _multiply_the_fastest(config, everyone, device, echo)
        rows = []
        for phase in PHASES:
            rows += _time_in_turn(config, everyone, phase, effort, echo)
    curve = measure_curve(
        config, rows, steps=effort.steps, episodes=effort.episodes, device=device, echo=echo
    )
    return rows + curve


def thread_counts(config: Config, device: torch.device) -> set[int]:
    """Return at how many threads other libraries are tried: each of them may suit them best."""
    ours = config.cluster.threads_per_worker
    if device.type != "cpu":
        return {ours}
    return {1, ours, torch.get_num_threads(), number_of_cores()}


def number_of_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def whole_machine(config: Config, device: torch.device) -> int:
    """Return with how many processes raymaml trains where all of this machine is its own."""
    if device.type != "cpu":
        return 1
    if config.cluster.num_workers != "auto":
        return config.cluster.num_workers
    return max(1, number_of_cores() // config.cluster.threads_per_worker)


def _multiply_the_fastest(
    config: Config, everyone: list[Contestant], device: torch.device, echo: Echo
) -> None:
    """Move raymaml's fastest method to the front and give it all processes that it trains with.

    It alone, since each process that waits holds 0.4 GiB of libraries.
    """
    seconds: dict[str, float] = {}

    def try_out(each: Contestant) -> None:
        if each.library == "raymaml":
            answer = each.children[0].ask("seconds", phase="training", episodes=1, warm_up=True)
            seconds[each.name] = answer["seconds"]

    def multiply(each: Contestant) -> None:
        if each is everyone[0] and each.library == "raymaml":
            for _ in range(whole_machine(config, device) - 1):
                each.children.append(Child(each.library, each.method, each.threads, device))
            for child in each.children[1:]:
                child.receive()
            each.begin(config)

    drop_failing(everyone, try_out, echo)
    everyone.sort(key=lambda each: seconds.get(each.name, float("inf")))  # is stable
    drop_failing(everyone, multiply, echo)


def _time_in_turn(
    config: Config, everyone: list[Contestant], phase: Phase, effort: Effort, echo: Echo
) -> list[Row]:
    """Time everybody once a round: raymaml by one process, and by all of its processes."""
    speeds: dict[tuple[str, int], list[float]] = {}

    def take_turn(each: Contestant) -> None:
        if each.name in absent:
            return
        for count in sorted({1, len(each.children)}):
            for child in each.children[:count]:
                child.send("seconds", phase=phase, episodes=effort.episodes, warm_up=True)
            slowest = max(child.receive()["seconds"] for child in each.children[:count])
            speeds.setdefault((each.name, count), []).append(count * effort.episodes / slowest)

    # All methods of raymaml adapt alike where there is no gradient: the first stands for them
    ours = [each.name for each in everyone if each.library == "raymaml"]
    absent = ours[1:] if phase == "evaluation" else []
    for number in range(effort.repeats):
        echo(f"{config.name}: {phase}, round {number + 1} of {effort.repeats}")
        drop_failing(everyone, take_turn, echo)
    return [
        _row(config, each, phase, count, statistics.median(speeds[each.name, count]))
        for each in everyone
        if each.name not in absent
        for count in sorted({1, len(each.children)})
    ]


def _row(config: Config, each: Contestant, phase: Phase, processes: int, speed: float) -> Row:
    training = phase == "training"
    peak = each.peak_mib[phase]
    return Row(
        config=config.name,
        phase=phase,
        library=each.library,
        method=each.method if training else "adapt",
        processes=processes,
        threads=each.threads,
        inner_steps=(config.inner if training else config.test_inner).num_steps,
        episodes_per_second=speed,
        peak_mib=None if peak is None else processes * peak,
        aten_calls=each.aten_calls[phase],
        difference=each.differences["float32", phase],
        difference_float64=each.differences["float64", phase],
    )
