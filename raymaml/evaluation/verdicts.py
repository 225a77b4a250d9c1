"""What the claims of a study come to, computed from records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raymaml.config.study import Check, Comparison, FirstTrials
from raymaml.evaluation.paired import paired
from raymaml.evaluation.records import RecordArrays
from raymaml.evaluation.statistics import bounds
from raymaml.evaluation.verdict import UNDECIDED, Outcome, Verdict

LEVEL = 0.95


def reach_verdicts(checks: Sequence[Check], arms: Mapping[str, RecordArrays]) -> list[Verdict]:
    """Return a verdict for each check.

    Each is by a two-sided 95% interval of its own: what is claimed is ``supported`` where the whole
    interval agrees with it, ``not supported`` where the whole contradicts it. It is an interval
    over episodes: the verdict is on these test classes. That of a difference for new classes is
    told beside it.

    Raises:
        UserError: the arms of a comparison were not judged on the same episodes.
    """
    return [_verdict(check, arms) for check in checks]


def outcome(
    low: float, high: float, expect: Literal["more than", "less than", "within"], margin: float
) -> Outcome:
    """Decide a claim about a number that lies in ``low..high``."""
    if expect == "less than":
        return outcome(-high, -low, "more than", margin)
    if expect == "more than":
        agrees, contradicts = low > margin, high <= margin
    else:
        agrees = -margin < low and high < margin
        contradicts = low >= margin or high <= -margin
    return "supported" if agrees else "not supported" if contradicts else UNDECIDED


def half_width_interval(
    values: NDArray[np.float64], count: int, level: float = LEVEL
) -> tuple[float, float, float]:
    """Return the half-width that a t interval over ``count`` values has, and an interval of it.

    ``h = t s / sqrt(count)`` with the standard deviation ``s`` of all n values, whose square has
    the standard error ``sqrt((m4 - s**4) / n)``, m4 being the fourth central moment; by the delta
    method that of ``s`` is ``1 / (2 s)`` times as large. No distribution is assumed. Of one value
    nothing is known.
    """
    from scipy import special

    if len(values) < 2 or count < 2:
        return math.nan, -math.inf, math.inf
    std = float(np.std(values, ddof=1))
    factor = float(special.stdtrit(count - 1, (1 + level) / 2)) / math.sqrt(count)
    if std == 0:
        return 0.0, 0.0, 0.0
    fourth = float(np.mean((values - values.mean()) ** 4))
    error = math.sqrt(max(fourth - std**4, 0.0) / len(values)) / (2 * std)
    reach = float(special.ndtri((1 + level) / 2)) * error
    return factor * std, factor * (std - reach), factor * (std + reach)


def _verdict(check: Check, arms: Mapping[str, RecordArrays]) -> Verdict:
    others = ""
    if isinstance(check, Comparison):
        found = paired(arms[check.arm], arms[check.minus], (check.arm, check.minus))
        mean, low, high = found.difference.mean, found.difference.low, found.difference.high
        what = f"{check.arm} minus {check.minus} over {found.difference.count:,} episodes"
        others = f"; for new classes {bounds(found.new_classes)}"
    elif isinstance(check, FirstTrials):
        mean, low, high = _first_minus_rest(arms[check.arm].accuracy, check.count)
        what = f"{check.arm}: the first {check.count:,} trials minus the others"
    else:
        values = arms[check.arm].accuracy
        mean, low, high = half_width_interval(values, check.count)
        what = (
            f"{check.arm}: half-width of a 95% interval over {check.count:,} trials, by the spread"
            f" of {len(values):,}"
        )
    expect = "more than" if check.kind == "precision" else check.expect
    return Verdict(
        claim=check.claim,
        outcome=outcome(low, high, expect, check.margin),
        numbers=f"{what}: {100 * mean:+.2f}% (95% interval {100 * low:+.2f}% to"
        f" {100 * high:+.2f}%){others}; claimed: {_claimed(expect, check.margin)}",
    )


def _claimed(expect: str, margin: float) -> str:
    if expect == "within":
        return f"between -{100 * margin:.2f}% and +{100 * margin:.2f}%"
    sign = "-" if expect == "less than" and margin else ""
    return f"{expect} {sign}{100 * margin:.2f}%"


def _first_minus_rest(values: NDArray[np.float64], count: int) -> tuple[float, float, float]:
    """Return the difference of two means and its Welch t interval; of too few values nan."""
    from scipy import stats

    first, rest = values[:count], values[count:]
    if len(first) < 2 or len(rest) < 2:
        return math.nan, -math.inf, math.inf
    difference = float(first.mean() - rest.mean())
    if first.std() == 0 and rest.std() == 0:
        return difference, difference, difference
    found = stats.ttest_ind(first, rest, equal_var=False).confidence_interval(LEVEL)
    return difference, float(found.low), float(found.high)
