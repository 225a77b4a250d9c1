"""Numbers over episodes, each with its formula.

All of them treat the episodes as independent draws. Episodes of one campaign share the classes
and images of the test split, so an interval here says how well this many episodes pin down the
accuracy on *these* classes; it is not an interval for new classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

FIRST_EPISODES = 600
"""Number of test episodes that most few-shot papers report (Finn et al. 2017 and after)."""

PROBABILITIES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles shown in a summary."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the confidence interval around it."""

    mean: float
    low: float
    high: float
    half_width: float
    """``high - mean``."""
    std: float
    """Sample standard deviation, divisor ``count - 1``; nan where there is none."""
    count: int
    """Of the values, which are episodes; of classes in an interval for new ones."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One quantity over the episodes of an arm."""

    overall: Interval
    first: Interval
    """Of the first ``FIRST_EPISODES`` episodes, or of all where there are fewer."""
    quantiles: dict[float, float]
    """Value at each of ``PROBABILITIES``."""
    num_nonfinite: int
    """Episodes whose value is infinite or not a number."""


def mean_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Return the mean of ``values`` [n] and its Student t interval.

    ``mean +- t * s / sqrt(n)``, with ``s**2 = sum((x - mean)**2) / (n - 1)`` and ``t`` the
    ``(1 + level) / 2`` quantile of Student's t with ``n - 1`` degrees of freedom.

    Equal values have half-width 0. One value says nothing about its spread: ``std`` is nan and
    the half-width infinite. If any value is not finite, so is nothing else: all are nan.

    Raises:
        ValueError: when there are no values, or ``level`` is not between 0 and 1.
    """
    count = _checked_count(values)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1")
    if not np.all(np.isfinite(values)):
        return symmetric_interval(math.nan, math.nan, math.nan, count)
    if count == 1:
        return symmetric_interval(float(values[0]), math.inf, math.nan, count)
    # Said apart: the rounded mean of equal values may differ from them in the last bit.
    if np.all(values == values[0]):
        return symmetric_interval(float(values[0]), 0.0, 0.0, count)
    std = float(np.std(values, ddof=1))
    t_quantile = float(special.stdtrit(count - 1, (1 + level) / 2))
    return symmetric_interval(
        float(np.mean(values)), t_quantile * std / math.sqrt(count), std, count
    )


def quantiles(
    values: NDArray[np.float64], probabilities: Sequence[float] = PROBABILITIES
) -> dict[float, float]:
    """Return the quantile of ``values`` [n] at each probability.

    Linear between order statistics: at ``p`` the value at position ``p * (n - 1)`` of the sorted
    values, counted from 0 (type 7 of Hyndman and Fan 1996). All are nan if any value is not
    finite.

    Raises:
        ValueError: when there are no values.
    """
    _checked_count(values)
    if not np.all(np.isfinite(values)):
        return dict.fromkeys(probabilities, math.nan)
    found = np.quantile(values, probabilities, method="linear")
    return {p: float(value) for p, value in zip(probabilities, found, strict=True)}


def summarize(values: NDArray[np.float64], first: int = FIRST_EPISODES) -> Summary:
    """Summarise ``values`` [n], which are in the order of the episodes.

    Raises:
        ValueError: when there are no values.
    """
    return Summary(
        overall=mean_interval(values),
        first=mean_interval(values[:first]),
        quantiles=quantiles(values),
        num_nonfinite=int(np.count_nonzero(~np.isfinite(values))),
    )


def interval_by_step(accuracy_by_step: NDArray[np.float64]) -> list[Interval]:
    """Return the ``mean_interval`` of each column of ``accuracy_by_step`` [E, T+1]."""
    return [mean_interval(column) for column in accuracy_by_step.T]


def bounds(interval: Interval) -> str:
    """Write where a difference lies, in per cent."""
    if not math.isfinite(interval.half_width):
        return "unknown"
    return f"{100 * interval.low:+.2f}% to {100 * interval.high:+.2f}%"


def _checked_count(values: NDArray[np.float64]) -> int:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected values of shape [n], n >= 1; got shape {values.shape}")
    return len(values)


def symmetric_interval(mean: float, half_width: float, std: float, count: int) -> Interval:
    """Return ``mean +- half_width``."""
    return Interval(
        mean=mean,
        low=mean - half_width,
        high=mean + half_width,
        half_width=half_width,
        std=std,
        count=count,
    )
