"""What the claims of a study come to, computed from records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raymaml.config.study import Check, Comparison, FirstTrials
from raymaml.evaluation.paired import FEWEST_EPISODES, paired
from raymaml.evaluation.records import RecordArrays
from raymaml.statistics.confidence_sequence import any_look_interval
from raymaml.statistics.intervals import (
    NO_WIDTH,
    Interval,
    alike,
    bounded_interval,
    bounds,
    over_trainings,
    span,
    spanning_interval,
)
from raymaml.statistics.significance import holm

Outcome = Literal["supported", "not supported", "undecided at this size"]
UNDECIDED: Literal["undecided at this size"] = "undecided at this size"
LEVEL = 0.95
_UNKNOWN = (-math.inf, math.inf)
_STOPS_EARLY = (
    "no verdict: evaluation.target_half_width let what was seen decide the number of episodes, and"
    " this claim's interval needs a number fixed beforehand; judge with"
    " evaluation.target_half_width=null"
)
NOT_REPLICATED = "this model, not replicated"
Trainings = Mapping[int, RecordArrays]
"""The records of an arm for each training of its model, by seed."""
Estimate = Callable[[float], tuple[float, float, float]]
"""Takes a level, and returns a number with the ends of its interval."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, and whether the records support it."""

    claim: str
    outcome: Outcome
    scope: str
    """Whether the verdict is on a method, with the number of trainings, or on one trained model."""
    numbers: str
    """The numbers that decide it, a sentence."""
    p: float
    """Of the claim, by Holm over all claims of the study."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the number that a claim is about."""

    what: str
    """The number, in words."""
    episodes: int
    """Fewest of any training."""
    smallest_group: int
    """Fewest that any mean in it rests on."""
    over_episodes: Estimate
    over_trainings: Estimate | None
    """None: a side was trained once."""
    scope: str
    others: str = ""
    """What is said beside the intervals."""
    refusal: str = ""
    """Why no interval of it holds; empty where one does."""

    @property
    def reason(self) -> str:
        """Say what keeps the claim from a verdict, or the verdict from being on a method."""
        if self.refusal:
            return self.refusal
        if self.smallest_group < FEWEST_EPISODES:
            return f"no verdict rests on fewer than {FEWEST_EPISODES} episodes"
        if any(
            high - low <= NO_WIDTH for _, low, high in (each(LEVEL) for each in self._estimates)
        ):
            return "no verdict rests on an interval without width"
        if self.over_trainings is None:
            return "to replicate it, give its models seeds, as in seeds: [0, 1, 2]"
        if self.over_trainings(LEVEL)[1:] == _UNKNOWN:
            return "its trainings came out alike, so the spread over trainings is unknown"
        return ""

    @property
    def _estimates(self) -> list[Estimate]:
        return [each for each in (self.over_episodes, self.over_trainings) if each is not None]

    def outcome(self, check: Check, level: float) -> Outcome:
        """Decide a claim by intervals of this level, which must agree."""
        if self.refusal or self.smallest_group < FEWEST_EPISODES:
            return UNDECIDED
        found = {
            outcome(*estimate(level)[1:], _expected(check), check.margin)
            for estimate in self._estimates
        }
        return found.pop() if len(found) == 1 else UNDECIDED

    def p_value(self, check: Check) -> float:
        """Return one minus the highest level at which the claim is decided; 1 where none is."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            is_open = self.outcome(check, 1 - middle) == UNDECIDED
            low, high = (middle, high) if is_open else (low, middle)
        return high


def reach_verdicts(
    checks: Sequence[Check], arms: Mapping[str, Trainings], *, stops_early: bool = False
) -> list[Verdict]:
    """Return a verdict for each check.

    A claim is ``supported`` where the whole 95% interval agrees with it, ``not supported`` where
    the whole contradicts it. There are two intervals, and both must say so: Student's t over
    trainings, which differ in their seed (paired by seed where both sides have the same ones, else
    Welch's), and that over episodes, which all trainings share. The verdict is on a method then;
    where a side was trained once there is but the second, and the verdict is on that model.
    The p-values of all claims are adjusted by Holm's method, and a claim above 5% is undecided.
    So is one by fewer than ``FEWEST_EPISODES`` episodes, which the first trials and the others must
    each have; one by an interval without width, or by trainings that came out alike; and where what
    was seen decided the number of episodes, one that is not about a difference of arms.

    Args:
        checks: the claims.
        arms: what was judged.
        stops_early: what was seen decided the number of episodes. Differences then have the
            interval over episodes that holds at any look.

    Raises:
        UserError: the arms of a comparison were not judged on the same episodes.
    """
    found = [evidence_of(check, arms, stops_early=stops_early) for check in checks]
    p_values = [each.p_value(check) for check, each in zip(checks, found, strict=True)]
    return [
        _verdict(check, each, p)
        for check, each, p in zip(checks, found, holm(p_values), strict=True)
    ]


def outcome(
    low: float, high: float, expect: Literal["more than", "less than", "within"], margin: float
) -> Outcome:
    """Decide a claim about a number that lies in ``low..high``; of no width decides nothing."""
    if not high - low > NO_WIDTH:
        return UNDECIDED
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
    factor = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) / math.sqrt(count)
    if std == 0:
        return 0.0, 0.0, 0.0
    fourth = float(np.mean((values - values.mean()) ** 4))
    error = math.sqrt(max(fourth - std**4, 0.0) / len(values)) / (2 * std)
    reach = float(special.ndtri((1 + level) / 2)) * error
    return factor * std, factor * (std - reach), factor * (std + reach)


def evidence_of(
    check: Check, arms: Mapping[str, Trainings], *, stops_early: bool = False
) -> Evidence:
    """Return what the records of ``arms`` say of a claim.

    Raises:
        UserError: the arms of a comparison were not judged on the same episodes.
    """
    if isinstance(check, Comparison):
        return _of_difference(check, arms[check.arm], arms[check.minus], stops_early)
    trainings = [records.accuracy for records in arms[check.arm].values()]
    estimate = _first_minus_rest if isinstance(check, FirstTrials) else half_width_interval

    def over_episodes(level: float) -> tuple[float, float, float]:
        # No narrower than the interval of the mean: the trainings share the episodes.
        mean, low, high = np.mean([estimate(each, check.count, level) for each in trainings], 0)
        return float(mean), float(low), float(high)

    values = [estimate(each, check.count, LEVEL)[0] for each in trainings]
    episodes = min(map(len, trainings))
    rest = max(episodes - check.count, 0)
    what = (
        f"{check.arm}: the first {check.count:,} trials minus the others"
        if isinstance(check, FirstTrials)
        else f"{check.arm}: half-width of a 95% interval over {check.count:,} trials"
    )
    return Evidence(
        what=what,
        episodes=episodes,
        smallest_group=min(check.count, rest) if isinstance(check, FirstTrials) else episodes,
        over_episodes=over_episodes,
        over_trainings=(lambda level: _ends(over_trainings(values, level, lowest=-1.0)))
        if len(values) > 1
        else None,
        scope=f"{len(values)} trainings" if len(values) > 1 else NOT_REPLICATED,
        refusal=_STOPS_EARLY if stops_early else "",
    )


def _of_difference(
    check: Comparison, ours: Trainings, theirs: Trainings, stops_early: bool
) -> Evidence:
    means = [mean_over_trainings(arm) for arm in (ours, theirs)]
    found = paired(means[0], means[1], (check.arm, check.minus))
    both = np.intersect1d(means[0].episode, means[1].episode)
    one, other = (mean.accuracy[np.isin(mean.episode, both)] for mean in means)
    values = [
        {seed: float(arm.accuracy[np.isin(arm.episode, both)].mean()) for seed, arm in side.items()}
        for side in (ours, theirs)
    ]
    return Evidence(
        what=f"{check.arm} minus {check.minus}",
        episodes=len(both),
        smallest_group=len(both),
        over_episodes=lambda level: _ends(
            any_look_difference(one - other, level)
            if stops_early
            else bounded_interval(one - other, level, lowest=-1.0)
        ),
        over_trainings=_difference_over_trainings(*values),
        scope=_scope(*values),
        others=f"; for new classes {bounds(found.new_classes)}",
    )


def any_look_difference(differences: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """Return the mean of differences, -1..1, and its interval that holds at any look."""
    found = any_look_interval((differences + 1) / 2, level)
    return spanning_interval(
        2 * found.mean - 1, 2 * found.low - 1, 2 * found.high - 1, 2 * found.std, found.count
    )


def mean_over_trainings(arm: Trainings) -> RecordArrays:
    """Return the episodes that all trainings were judged on, with their mean accuracy."""
    first, *_ = arm.values()
    common = reduce(np.intersect1d, (records.episode for records in arm.values()))
    accuracies = [each.accuracy[np.isin(each.episode, common)] for each in arm.values()]
    at = np.isin(first.episode, common)
    own = vars(first).items()
    columns: dict[str, Any] = {n: value[at] for n, value in own if isinstance(value, np.ndarray)}
    return replace(first, **(columns | {"accuracy": np.mean(accuracies, axis=0)}))


def _difference_over_trainings(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Estimate | None:
    if min(len(ours), len(theirs)) < 2:
        return None
    if ours.keys() == theirs.keys():
        differences = [ours[seed] - theirs[seed] for seed in ours]
        return lambda level: _ends(over_trainings(differences, level, lowest=-1.0))
    return lambda level: _welch(np.array([*ours.values()]), np.array([*theirs.values()]), level)


def _scope(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    if min(len(ours), len(theirs)) < 2:
        return NOT_REPLICATED
    if ours.keys() == theirs.keys():
        return f"{len(ours)} trainings of each, paired by seed"
    return f"{len(ours)} trainings against {len(theirs)}"


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _verdict(check: Check, evidence: Evidence, p: float) -> Verdict:
    mean, *ends = evidence.over_episodes(LEVEL)
    intervals = [f"over {evidence.episodes:,} episodes {span(*ends)}{evidence.others}"]
    if evidence.over_trainings is not None:
        intervals.insert(0, f"over {evidence.scope} {span(*evidence.over_trainings(LEVEL)[1:])}")
    numbers = [
        f"{evidence.what}: {100 * mean:+.2f}% (95% intervals: {'; '.join(intervals)})",
        f"claimed: {_claimed(_expected(check), check.margin)}",
        f"p {p:.2g} (Holm)",
        *([evidence.reason] if evidence.reason else []),
    ]
    return Verdict(
        claim=check.claim,
        outcome=evidence.outcome(check, LEVEL) if p <= 1 - LEVEL else UNDECIDED,
        scope=evidence.scope,
        numbers="; ".join(numbers),
        p=p,
    )


def _expected(check: Check) -> Literal["more than", "less than", "within"]:
    return "more than" if check.kind == "precision" else check.expect


def _claimed(expect: str, margin: float) -> str:
    if expect == "within":
        return f"between -{100 * margin:.2f}% and +{100 * margin:.2f}%"
    sign = "-" if expect == "less than" and margin else ""
    return f"{expect} {sign}{100 * margin:.2f}%"


def _first_minus_rest(
    values: NDArray[np.float64], count: int, level: float
) -> tuple[float, float, float]:
    """Return the difference of two means and its interval; of a part without values nan.

    The intervals of both means are squared and added (Newcombe 1998)::

        low = m1 - m2 - sqrt((m1 - low1)**2 + (high2 - m2)**2)
        high = m1 - m2 + sqrt((high1 - m1)**2 + (m2 - low2)**2)
    """
    if not 0 < count < len(values):
        return math.nan, *_UNKNOWN
    ours, theirs = (bounded_interval(each, level) for each in (values[:count], values[count:]))
    difference = ours.mean - theirs.mean
    below = math.hypot(ours.mean - ours.low, theirs.high - theirs.mean)
    above = math.hypot(ours.high - ours.mean, theirs.mean - theirs.low)
    return difference, max(difference - below, -1.0), min(difference + above, 1.0)


def _welch(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], level: float
) -> tuple[float, float, float]:
    """Return the difference of two means over trainings and its Welch t interval.

    Its ends are infinite where the trainings of a side came out alike.
    """
    from scipy import stats

    difference = float(ours.mean() - theirs.mean())
    if alike(ours) or alike(theirs):
        return difference, *_UNKNOWN
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(level)
    return difference, max(float(found.low), -1.0), min(float(found.high), 1.0)
