"""Intervals of a difference of two means, and of the half-width that an interval would have."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from raymaml.statistics.intervals import Interval, alike, bounded_interval, spanning_interval


def unknown(value: float, count: int) -> Interval:
    """Return an interval without ends around ``value``."""
    return spanning_interval(value, -math.inf, math.inf, math.nan, count)


def difference_interval(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], level: float = 0.95
) -> Interval:
    """Return the difference of two means in 0..1 and its interval (Newcombe 1998).

    The intervals of both means are squared and added::

        low = m1 - m2 - sqrt((m1 - low1)**2 + (high2 - m2)**2)
        high = m1 - m2 + sqrt((high1 - m1)**2 + (m2 - low2)**2)

    The difference is nan, and its ends are infinite, where one of the two has no values.
    """
    count = len(ours) + len(theirs)
    if not (len(ours) and len(theirs)):
        return unknown(math.nan, count)
    one, other = bounded_interval(ours, level), bounded_interval(theirs, level)
    difference = one.mean - other.mean
    below = math.hypot(one.mean - one.low, other.high - other.mean)
    above = math.hypot(one.high - one.mean, other.mean - other.low)
    ends = max(difference - below, -1.0), min(difference + above, 1.0)
    return spanning_interval(difference, *ends, math.nan, count)


def welch_interval(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], level: float = 0.95
) -> Interval:
    """Return the difference of two means over trainings, in -1..1, and its Welch t interval.

    Its ends are infinite where all trainings of a side have equal results.
    """
    difference, count = float(ours.mean() - theirs.mean()), len(ours) + len(theirs)
    if alike(ours) or alike(theirs):
        return unknown(difference, count)
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(level)
    ends = max(float(found.low), -1.0), min(float(found.high), 1.0)
    return spanning_interval(difference, *ends, math.nan, count)


def half_width_interval(values: NDArray[np.float64], count: int, level: float = 0.95) -> Interval:
    """Return the half-width that a 95% t interval over ``count`` values has, and its interval.

    ``h = t s / sqrt(count)`` with the standard deviation ``s`` of all n values, whose square has
    the standard error ``sqrt((m4 - s**4) / n)``, m4 being the fourth central moment; by the delta
    method that of ``s`` is ``1 / (2 s)`` times as large. No distribution is assumed. Of one value
    nothing is known.
    """
    if len(values) < 2 or count < 2:
        return unknown(math.nan, len(values))
    std = float(np.std(values, ddof=1))
    factor = float(special.stdtrit(count - 1, (1 + 0.95) / 2)) / math.sqrt(count)
    error = 0.0
    if std:
        fourth = float(np.mean((values - values.mean()) ** 4))
        error = math.sqrt(max(fourth - std**4, 0.0) / len(values)) / (2 * std)
    reach = float(special.ndtri((1 + level) / 2)) * error
    ends = factor * (std - reach), factor * (std + reach)
    return spanning_interval(factor * std, *ends, math.nan, len(values))
