"""Values of a search space: a function of seed, trial and key, never of history (contract 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raymaml.config.sweep import Dimension, Pbt, SweepConfig
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
            values[key] = draw(dimension, _unit(settings.seed, "draw", trial, key))
    return values


def draw(dimension: Dimension, unit: float) -> Any:
    """Return the value at ``unit`` (0 <= unit < 1) of a dimension."""
    if dimension.integer is not None:
        low, high = dimension.integer
        return low + int(unit * (high - low + 1))
    if dimension.bounds is None:
        return dimension.values[int(unit * len(dimension.values))]
    return from_position(dimension, unit)


def from_position(dimension: Dimension, position: float) -> float:
    """Return the number at ``position`` (0..1) between the bounds, on the dimension's scale."""
    assert dimension.bounds is not None
    low, high = dimension.bounds
    if dimension.log_uniform is None:
        value = low + position * (high - low)
    else:
        value = math.exp(math.log(low) + position * (math.log(high) - math.log(low)))
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def to_position(dimension: Dimension, value: Any) -> float:
    """Return where a value lies between the bounds, or in the list: 0..1, of one value 0.5."""
    if dimension.bounds is None:
        last = len(dimension.values) - 1
        return dimension.values.index(value) / last if last else 0.5
    low, high = dimension.bounds
    if dimension.log_uniform is not None:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def perturb(
    settings: SweepConfig, pbt: Pbt, values: Mapping[str, Any], *, trial: int, step: int
) -> dict[str, Any]:
    """Return what ``trial`` goes on with at ``step``, having taken over ``values``."""
    changed = dict(values)
    for key in settings.perturbed:
        names = (settings.seed, "perturb", trial, step, key)
        anew, which = _unit(*names, "anew"), _unit(*names, "which")
        if anew < pbt.resample_probability:
            changed[key] = draw(settings.space[key], which)
        else:
            changed[key] = move(settings.space[key], values[key], pbt.factors, up=which >= 0.5)
    return changed


def move(dimension: Dimension, value: Any, factors: tuple[float, float], *, up: bool) -> Any:
    """Return a neighbour of ``value``: times a factor, within the bounds; next in the list."""
    if dimension.bounds is None:
        last = len(dimension.values) - 1
        place = dimension.values.index(value) + (1 if up else -1)
        return dimension.values[min(max(place, 0), last)]
    low, high = dimension.bounds
    moved = min(max(value * factors[up], low), high)
    if dimension.integer is None:
        return float(f"{moved:.{DIGITS}g}")
    at_least = value + (1 if up else -1)
    whole = max(round(moved), at_least) if up else min(round(moved), at_least)
    return int(min(max(whole, low), high))


def _unit(seed: int, *names: str | int) -> float:
    return float(uniform(bit_stream(seed, "sweep", *names), 1)[0])
