"""Time and memory against the number of inner steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from raymaml.bench.cases import with_steps
from raymaml.bench.contest import Contestant, Echo, contest, drop_failing
from raymaml.bench.probes import available_mib
from raymaml.bench.rows import Row
from raymaml.config.schema import Config


def measure_curve(
    config: Config,
    rows: Sequence[Row],
    *,
    steps: Sequence[int],
    episodes: int,
    device: torch.device,
    echo: Echo,
) -> list[Row]:
    """Measure raymaml's methods, and plain, at other numbers of inner steps.

    Each point is that of a fresh process, and they are timed once. Whoever runs out of memory, or
    would, is left out from there on.

    Args:
        config: what has been measured.
        rows: what came out; its contenders are followed.
        steps: numbers of inner steps.
        episodes: on the clock, at each number.
        device: where the contenders compute.
        echo: where progress goes.
    """
    threads = config.cluster.threads_per_worker
    points = [
        row
        for row in rows
        if row.phase == "training"
        and row.library in {"raymaml", "plain"}
        and (row.processes, row.threads) == (1, threads)
    ]
    names = [row.option for row in points]
    new: list[Row] = []
    for num_steps in sorted(set(steps) - {config.inner.num_steps}):
        at = with_steps(config, num_steps)
        names = [name for name in names if _fits(name, at, [*points, *new], device, echo)]
        if not names:
            break
        echo(f"{config.name}: inner steps: {num_steps}")
        with contest(at, names, {threads}, device, echo) as everyone:
            drop_failing(everyone, partial(_measure_point, at, episodes, new), echo)
        names = [row.option for row in new if row.inner_steps == num_steps]
    return new


def _fits(
    name: str, config: Config, points: Sequence[Row], device: torch.device, echo: Echo
) -> bool:
    """Tell whether a contender will find the memory for ``config``; say so if it will not."""
    peaks = {row.inner_steps: row.peak_mib for row in points if row.option == name}
    needed, available = extrapolate(peaks, config.inner.num_steps), available_mib(device)
    if needed is None or available is None or needed <= available:
        return True
    echo(
        f"  {name}: left out from {config.inner.num_steps} inner steps on: would need about"
        f" {needed:,.0f} MiB; {available:,.0f} MiB are available"
    )
    return False


def _measure_point(config: Config, episodes: int, rows: list[Row], each: Contestant) -> None:
    each.begin(config)
    child = each.children[0]
    peak_mib = child.ask("outcome", phase="training", path=None)["peak_mib"]
    answer = child.ask("seconds", phase="training", episodes=episodes, warm_up=True)
    rows.append(
        Row(
            config=config.name,
            phase="training",
            library=each.library,
            method=each.method,
            processes=1,
            threads=each.threads,
            inner_steps=config.inner.num_steps,
            episodes_per_second=episodes / answer["seconds"],
            peak_mib=peak_mib,
        )
    )


def extrapolate(peaks: Mapping[int, float | None], num_steps: int) -> float | None:
    """Continue peak memory, MiB by inner steps, along the line through the nearest points below."""
    below = sorted((at, peak) for at, peak in peaks.items() if peak is not None and at < num_steps)
    if len(below) < 2:
        return below[0][1] if below else None
    (first, low), (second, high) = below[-2:]
    return high + (high - low) / (second - first) * (num_steps - second)
