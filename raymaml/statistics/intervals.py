"""Numbers over episodes, each with its formula.

All of them treat the episodes as independent draws. Episodes of one campaign share the classes
and images of the test split, so an interval here says how well this many episodes pin down the
accuracy on *these* classes; it is not an interval for new classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FIRST_EPISODES = 600
"""Number of test episodes that most few-shot papers report (Finn et al. 2017 and after)."""

PROBABILITIES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles shown in a summary."""

_ROUNDING = 1e-3
"""A sum of rounded numbers may be outside its range by this."""
NO_WIDTH = 1e-9
"""Numbers in 0..1 that differ by less are alike: they differ by the rounding of sums."""
_MOST_TRIALS = 1e12
"""Effective trials beyond which an interval is no wider than rounding."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the confidence interval around it."""

    mean: float
    low: float
    high: float
    half_width: float
    """The larger of ``high - mean`` and ``mean - low``: the number after ``+-``."""
    std: float
    """Sample standard deviation, divisor ``count - 1``; nan where there is none."""
    count: int
    """Of the values, which are episodes; of classes in an interval for new ones."""


IntervalOf = Callable[[NDArray[np.float64]], Interval]


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
    # the rounded mean of equal values may differ from them in the last bit
    if np.all(values == values[0]):
        return symmetric_interval(float(values[0]), 0.0, 0.0, count)
    std = float(np.std(values, ddof=1))
    t_quantile = float(special.stdtrit(count - 1, (1 + level) / 2))
    return symmetric_interval(
        float(np.mean(values)), t_quantile * std / math.sqrt(count), std, count
    )


def bounded_interval(
    values: NDArray[np.float64], level: float = 0.95, *, lowest: float = 0.0, highest: float = 1.0
) -> Interval:
    """Return the mean of ``values`` [n], all in ``lowest..highest``, and an interval that covers.

    A t interval has no width where all values are equal, and covers too seldom near an end of the
    range, where few episodes hold all of the errors. This one counts the errors as a proportion
    does: it is the interval of Clopper and Pearson 1934 at the effective number of trials (Korn and
    Graubard 1998), see ``bounded_ends``. Far from the ends it is as wide as the t interval.

    One value is enough. A kind of episode that is rarer than one in ``n / 3`` may be missing from
    the sample, and no interval of ordinary width shows it.

    Raises:
        ValueError: there are no values, or one is outside of the range by more than rounding.
    """
    count = _checked_count(values)
    if not np.all(np.isfinite(values)):
        return symmetric_interval(math.nan, math.nan, math.nan, count)
    inside = np.clip(values, lowest, highest)
    if not np.all(np.abs(inside - values) <= _ROUNDING):
        raise ValueError(f"the values must be in {lowest:g}..{highest:g}")
    values = inside
    # the rounded mean of equal values may differ from them in the last bit
    equal = bool(np.all(values == values[0]))
    mean = float(values[0]) if equal else float(np.mean(values))
    squares = np.square(values - mean)
    std = math.nan if count == 1 else math.sqrt(float(squares.sum()) / (count - 1))
    degrees = degrees_of_freedom(count, squares.mean(), np.square(squares).mean())
    error = 0.0 if equal else std / math.sqrt(count)
    return interval_within(
        mean, error, std, count, degrees=float(degrees), level=level, lowest=lowest, highest=highest
    )


def interval_within(
    mean: float,
    error: float,
    std: float,
    count: int,
    *,
    degrees: float,
    level: float = 0.95,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Interval:
    """Return ``mean`` with the ends that ``bounded_ends`` gives it in ``lowest..highest``."""
    span = highest - lowest
    share = min(max((mean - lowest) / span, 0.0), 1.0)
    found = bounded_ends(share, error / span, degrees, count, level)
    low, high = (lowest + span * float(end) for end in found)
    return spanning_interval(mean, min(low, mean), max(high, mean), std, count)


def bounded_ends(
    mean: ArrayLike, error: ArrayLike, degrees: ArrayLike, count: ArrayLike, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of intervals of means in 0..1; arguments and ends of one shape [...].

    A mean ``m`` with standard error ``e`` is as uncertain as that of ``m (1 - m) / e**2`` trials
    which succeed or fail; times ``(z / t)**2``, the quantiles of the normal distribution and of
    Student's t, since ``e`` is an estimate. The ends are those of Clopper and Pearson 1934 for so
    many trials (Korn and Graubard 1998)::

        low = quantile of Beta(N m, N (1 - m) + 1) at (1 - level) / 2
        high = quantile of Beta(N m + 1, N (1 - m)) at (1 + level) / 2

    Equal values have no error. Any other value then has a probability of at most ``1 - c``
    with ``c = ((1 - level) / 2)**(1 / count)``, else it would have shown; the rest may lie anywhere
    in 0..1, so the ends are ``m c`` and ``m c + 1 - c``.

    Args:
        mean: in 0..1.
        error: standard error; 0 says that all values are equal.
        degrees: degrees of freedom of ``error``.
        count: number of values.
        level: probability to cover.
    """
    mean, error, degrees = (np.asarray(each, dtype=np.float64) for each in (mean, error, degrees))
    tail = (1 - level) / 2
    equal = (error == 0) | (mean <= 0) | (mean >= 1)
    share, spread = np.where(equal, 0.5, mean), np.where(equal, 1.0, error)
    factor = special.ndtri(tail) / special.stdtrit(np.where(equal, 1.0, degrees), tail)
    trials = np.minimum(share * (1 - share) / spread**2 * factor**2, _MOST_TRIALS)
    low = special.betaincinv(trials * share, trials * (1 - share) + 1, tail)
    high = special.betainccinv(trials * share + 1, trials * (1 - share), tail)
    seen = tail ** (1 / np.asarray(count, dtype=np.float64))
    return np.where(equal, mean * seen, low), np.where(equal, mean * seen + 1 - seen, high)


def wilson_interval(successes: int, count: int, level: float = 0.95) -> Interval:
    """Return the share of ``count`` trials that succeed, and its score interval (Wilson 1927).

    With ``p = successes / count`` and ``z`` the ``(1 + level) / 2`` quantile of the normal
    distribution, the ends are ``(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) /
    (1 + z^2 / n)``.

    Raises:
        ValueError: there is no trial, or not 0 to ``count`` of them succeed.
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} of {count} trials cannot succeed")
    share, z = successes / count, float(special.ndtri((1 + level) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    reach /= 1 + z**2 / count
    low, high = min(max(middle - reach, 0.0), share), max(min(middle + reach, 1.0), share)
    std = math.nan if count == 1 else math.sqrt(share * (1 - share) * count / (count - 1))
    return spanning_interval(share, low, high, std, count)


def degrees_of_freedom(
    count: ArrayLike, second: ArrayLike, fourth: ArrayLike
) -> NDArray[np.float64]:
    """Return the degrees of freedom of a standard deviation, by the kurtosis of its values.

    The fewer values hold the spread, the less it is known. ``1.5 n / (G2 + 2)``, at most ``n - 1``,
    where G2 is the sample excess kurtosis ``(n - 1) / ((n - 2) (n - 3)) ((n + 1) g2 + 6)`` with
    ``g2 = m4 / m2**2 - 3``. A factor of 2 gives a chi-square variable the variance that ``s**2``
    has (Satterthwaite 1946); 1.5 also covers where mean and ``s**2`` move together, as they do near
    an end of the range (by simulation). Of less than four values it is ``n - 1``.

    Args:
        count: number of values.
        second: their second central moment m2, divisor ``count``...
        fourth: ...and their fourth.
    """
    n = np.asarray(count, dtype=np.float64)
    second, fourth = np.asarray(second, dtype=np.float64), np.asarray(fourth, dtype=np.float64)
    known = (n > 3) & (second > 0)
    enough = np.where(known, n, 4.0)
    excess = np.where(known, fourth, 3.0) / np.where(known, second, 1.0) ** 2 - 3
    kurtosis = (enough - 1) / ((enough - 2) * (enough - 3)) * ((enough + 1) * excess + 6)
    found = 1.5 * enough / np.maximum(kurtosis + 2, 1e-9)
    return np.where(known, np.minimum(found, n - 1), np.maximum(n - 1, 1.0))


def over_trainings(
    values: Sequence[float], level: float = 0.95, *, lowest: float = 0.0
) -> Interval:
    """Return the mean of one number per training and its t interval, within ``lowest..1``.

    The ends are infinite for one training, and for trainings with equal results: these do not show
    how far another training would be from them.
    """
    found = mean_interval(np.asarray(values), level)
    if alike(values):
        return replace(found, low=-math.inf, high=math.inf, half_width=math.inf)
    return replace(found, low=max(found.low, lowest), high=min(found.high, 1.0))


def alike(values: Sequence[float] | NDArray[np.float64]) -> bool:
    """Return whether numbers differ by less than ``NO_WIDTH``, as one number does."""
    return bool(np.ptp(values) < NO_WIDTH)


def quantiles(values: NDArray[np.float64]) -> dict[float, float]:
    """Return the quantile of ``values`` [n] at each of ``PROBABILITIES``.

    Linear between order statistics: at ``p`` the value at position ``p * (n - 1)`` of the sorted
    values, counted from 0 (type 7 of Hyndman and Fan 1996). All are nan if any value is not
    finite.

    Raises:
        ValueError: when there are no values.
    """
    _checked_count(values)
    if not np.all(np.isfinite(values)):
        return dict.fromkeys(PROBABILITIES, math.nan)
    found = np.quantile(values, PROBABILITIES, method="linear")
    return {p: float(value) for p, value in zip(PROBABILITIES, found, strict=True)}


def span(low: float, high: float) -> str:
    """Write the ends of an interval of a difference, in per cent."""
    if not math.isfinite(high - low):
        return "unknown"
    return f"{100 * low:+.2f}% to {100 * high:+.2f}%"


def _checked_count(values: NDArray[np.float64]) -> int:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected values of shape [n], n >= 1; got shape {values.shape}")
    return len(values)


def spanning_interval(mean: float, low: float, high: float, std: float, count: int) -> Interval:
    """Return ``mean`` between two ends, which may be at different distances from it."""
    reach = max(high - mean, mean - low)
    return Interval(mean=mean, low=low, high=high, half_width=reach, std=std, count=count)


def widened(interval: Interval, other: Interval) -> Interval:
    """Return ``interval``, reaching as far as ``other`` at both ends."""
    ends = min(interval.low, other.low), max(interval.high, other.high)
    return spanning_interval(interval.mean, *ends, interval.std, interval.count)


def symmetric_interval(mean: float, half_width: float, std: float, count: int) -> Interval:
    """Return ``mean +- half_width``."""
    low, high = mean - half_width, mean + half_width
    return Interval(mean=mean, low=low, high=high, half_width=half_width, std=std, count=count)
