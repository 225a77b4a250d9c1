"""Values of a search space: a function of seed, trial and key, never of history (contract 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from raymaml.config.sweep import Dimension, SweepConfig
from raymaml.seeding import bit_stream, uniform

DIGITS = 6
"""Significant digits of a drawn number: as it reads in a config, so it is."""


def draw_values(settings: SweepConfig, trial: int) -> dict[str, Any]:
    """Return the values of one trial by dotted key.

    Every key has a stream of its own: another key, or more trials, change nothing.
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
