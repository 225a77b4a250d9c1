"""Time and memory against the number of inner steps."""

from __future__ import annotations

from functools import partial

import torch

from raymaml.bench.cases import with_steps
from raymaml.bench.contest import Contestant, Echo, dismiss, drop_failing
from raymaml.bench.probes import available_mib
from raymaml.bench.rows import Row
from raymaml.config.schema import Config


def measure_curve(
    config: Config,
    everyone: list[Contestant],
    *,
    steps: tuple[int, ...],
    episodes: int,
    device: torch.device,
    echo: Echo,
) -> list[Row]:
    """Measure one process of each contestant at numbers of inner steps other than its own.

    Whoever runs out of memory, or would, is left out from there on.

    Args:
        config: what the contestants have been measured at.
        everyone: contestants; those who are left out are taken out of the list.
        steps: numbers of inner steps.
        episodes: on the clock, at each number.
        device: where the contestants compute.
        echo: where progress goes.
    """
    own = config.inner.num_steps
    known = {each.name: {own: each.peak_mib["training"]} for each in everyone}
    rows = []

    def measure_point(num_steps: int, each: Contestant) -> None:
        each.begin(with_steps(config, num_steps))
        child = each.children[0]
        peak = child.ask("outcome", phase="training", path=None)["peak_mib"]
        answer = child.ask("seconds", phase="training", episodes=episodes, warm_up=False)
        known[each.name][num_steps] = peak
        rows.append(
            Row(
                config=config.name,
                phase="training",
                library=each.library,
                method=each.method,
                processes=1,
                threads=each.threads,
                inner_steps=num_steps,
                episodes_per_second=episodes / answer["seconds"],
                peak_mib=peak,
            )
        )

    for num_steps in sorted(set(steps) - {own}):
        if not everyone:
            break
        echo(f"{config.name}: inner steps: {num_steps}")
        for each in list(everyone):
            needed, available = extrapolate(known[each.name], num_steps), available_mib(device)
            if needed is not None and available is not None and needed > available:
                echo(
                    f"  {each.name}: left out from here on: would need about {needed:,.0f} MiB;"
                    f" {available:,.0f} MiB are available"
                )
                dismiss(each)
                everyone.remove(each)
        drop_failing(everyone, partial(measure_point, num_steps), echo)
    return rows


def extrapolate(peaks: dict[int, float | None], num_steps: int) -> float | None:
    """Continue peak memory, MiB by inner steps, along the line through the nearest points below."""
    below = sorted((at, peak) for at, peak in peaks.items() if peak is not None and at < num_steps)
    if len(below) < 2:
        return below[0][1] if below else None
    (first, low), (second, high) = below[-2:]
    return high + (high - low) / (second - first) * (num_steps - second)
