"""Verdicts on the claims of a study, computed from records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Literal

import numpy as np

from raymaml.config.study import Check, Comparison, FirstTrials
from raymaml.evaluation.paired import FEWEST_EPISODES, paired
from raymaml.evaluation.records import RecordArrays
from raymaml.statistics.confidence_sequence import any_look_difference
from raymaml.statistics.differences import (
    difference_interval,
    half_width_interval,
    welch_interval,
)
from raymaml.statistics.intervals import (
    NO_WIDTH,
    Interval,
    bounded_interval,
    over_trainings,
    span,
    spanning_interval,
)
from raymaml.statistics.significance import holm

Outcome = Literal["supported", "not supported", "undecided at this size"]
UNDECIDED: Literal["undecided at this size"] = "undecided at this size"
LEVEL = 0.95
_STOPS_EARLY = (
    "no verdict: evaluation.target_half_width let what was seen decide the number of episodes, and"
    " this claim's interval needs a number fixed beforehand; judge with"
    " evaluation.target_half_width=null"
)
NOT_REPLICATED = "this model, not replicated"
Trainings = Mapping[int, RecordArrays]
"""The records of an arm for each training of its model, by seed."""
Estimate = Callable[[float], Interval]
"""Takes a level, and returns a number with its interval."""


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
    """The number that a claim is about, with its intervals."""

    what: str
    """The number, in words."""
    episodes: int
    """Fewest of any training."""
    smallest_group: int
    """Fewest that any mean in it rests on."""
    estimates: tuple[Estimate, ...]
    """Over the episodes; then over the trainings, unless a side was trained once."""
    scope: str
    others: str = ""
    """Further intervals, as text."""
    refusal: str = ""
    """Why no interval of it holds; empty where one does."""

    @property
    def reason(self) -> str:
        """Why there is no verdict, or none on a method; empty where there is one."""
        if self.refusal:
            return self.refusal
        if self.smallest_group < FEWEST_EPISODES:
            return f"no verdict rests on fewer than {FEWEST_EPISODES} episodes"
        found = [estimate(LEVEL) for estimate in self.estimates]
        if any(each.high - each.low <= NO_WIDTH for each in found):
            return "no verdict rests on an interval without width"
        if len(found) == 1:
            return "to replicate it, give its models seeds, as in seeds: [0, 1, 2]"
        if math.isinf(found[1].high):
            return "its trainings came out alike, so the spread over trainings is unknown"
        return ""

    def outcome(self, check: Check, level: float) -> Outcome:
        """Decide a claim by intervals of this level, which must agree."""
        if self.refusal or self.smallest_group < FEWEST_EPISODES:
            return UNDECIDED
        intervals = [estimate(level) for estimate in self.estimates]
        found = {outcome(each.low, each.high, check.expect, check.margin) for each in intervals}
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
    the whole contradicts it. Two intervals must both say so: Student's t over trainings, which
    differ in their seed (paired by seed where both sides have the same ones, else Welch's), and the
    interval over episodes, which all trainings share. The verdict is then on a method. Where a side
    was trained once there is only the second interval, and the verdict is on that model.

    Holm's method adjusts the p-values of all claims; a claim above 5% is undecided. These are
    undecided, too:

    - a claim on fewer than ``FEWEST_EPISODES`` episodes; the first trials and the others must each
      have as many;
    - a claim whose interval has no width, or whose trainings have equal results;
    - where judging may have stopped early, any claim that is not about a difference of arms.

    Args:
        checks: the claims.
        arms: the records, by name of the arm.
        stops_early: judging may have stopped early. Differences then have the interval over
            episodes that holds at any look.

    Raises:
        UserError: the arms of a comparison were not judged on the same episodes.
    """
    found = [evidence_of(check, arms, stops_early=stops_early) for check in checks]
    p_values = holm([each.p_value(check) for check, each in zip(checks, found, strict=True)])
    return [_verdict(*each) for each in zip(checks, found, p_values, strict=True)]


def outcome(
    low: float, high: float, expect: Literal["more than", "less than", "within"], margin: float
) -> Outcome:
    """Decide a claim about a number in ``low..high``; an interval without width decides nothing."""
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
    episodes, count = min(map(len, trainings)), check.count
    if isinstance(check, FirstTrials):
        what = f"{check.arm}: the first {count:,} trials minus the others"
        smallest_group = min(count, max(episodes - count, 0))
        estimates = [partial(difference_interval, v[:count], v[count:]) for v in trainings]
    else:
        what = f"{check.arm}: half-width of a 95% interval over {count:,} trials"
        smallest_group = episodes
        estimates = [partial(half_width_interval, values, count) for values in trainings]

    def over_episodes(level: float) -> Interval:
        # No narrower than the interval of the mean: the trainings share the episodes.
        found = [estimate(level) for estimate in estimates]
        mean, low, high = np.mean([(each.mean, each.low, each.high) for each in found], 0).tolist()
        return spanning_interval(mean, low, high, math.nan, episodes)

    values = [estimate(LEVEL).mean for estimate in estimates]
    several = len(values) > 1
    over = [partial(over_trainings, values, lowest=-1.0)] if several else []
    return Evidence(
        what=what,
        episodes=episodes,
        smallest_group=smallest_group,
        estimates=(over_episodes, *over),
        scope=f"{len(values)} trainings" if several else NOT_REPLICATED,
        refusal=_STOPS_EARLY if stops_early else "",
    )


def _of_difference(
    check: Comparison, ours: Trainings, theirs: Trainings, stops_early: bool
) -> Evidence:
    means = [mean_over_trainings(arm) for arm in (ours, theirs)]
    new_classes = paired(means[0], means[1], (check.arm, check.minus)).new_classes
    both = np.intersect1d(means[0].episode, means[1].episode)
    one, other = (mean.accuracy[np.isin(mean.episode, both)] for mean in means)
    by_seed = [
        {seed: float(arm.accuracy[np.isin(arm.episode, both)].mean()) for seed, arm in side.items()}
        for side in (ours, theirs)
    ]
    over, scope = _over_trainings(*by_seed)
    return Evidence(
        what=f"{check.arm} minus {check.minus}",
        episodes=len(both),
        smallest_group=len(both),
        estimates=(
            partial(any_look_difference, one - other)
            if stops_early
            else partial(bounded_interval, one - other, lowest=-1.0),
            *over,
        ),
        scope=scope,
        others=f"; for new classes {span(new_classes.low, new_classes.high)}",
    )


def mean_over_trainings(arm: Trainings) -> RecordArrays:
    """Return the episodes that all trainings were judged on, with their mean accuracy."""
    first, *_ = arm.values()
    common = reduce(np.intersect1d, (records.episode for records in arm.values()))
    accuracies = [each.accuracy[np.isin(each.episode, common)] for each in arm.values()]
    shared = first.take(np.isin(first.episode, common))
    return replace(shared, accuracy=np.mean(accuracies, axis=0))


def _over_trainings(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> tuple[list[Estimate], str]:
    """Return the estimate of the difference over trainings, if there is one, and its scope."""
    if min(len(ours), len(theirs)) < 2:
        return [], NOT_REPLICATED
    if ours.keys() == theirs.keys():
        differences = [ours[seed] - theirs[seed] for seed in ours]
        scope = f"{len(ours)} trainings of each, paired by seed"
        return [partial(over_trainings, differences, lowest=-1.0)], scope
    sides = np.array([*ours.values()]), np.array([*theirs.values()])
    return [partial(welch_interval, *sides)], f"{len(ours)} trainings against {len(theirs)}"


def _verdict(check: Check, evidence: Evidence, p: float) -> Verdict:
    found, *over = (estimate(LEVEL) for estimate in evidence.estimates)
    spans = [f"over {evidence.scope} {span(each.low, each.high)}" for each in over]
    spans.append(f"over {evidence.episodes:,} episodes {span(found.low, found.high)}")
    intervals = "; ".join(spans) + evidence.others
    numbers = [
        f"{evidence.what}: {100 * found.mean:+.2f}% (95% intervals: {intervals})",
        f"claimed: {_claimed(check.expect, check.margin)}",
        f"p {p:.2g} (Holm)",
        evidence.reason,
    ]
    return Verdict(
        claim=check.claim,
        outcome=evidence.outcome(check, LEVEL) if p <= 1 - LEVEL else UNDECIDED,
        scope=evidence.scope,
        numbers="; ".join(filter(None, numbers)),
        p=p,
    )


def _claimed(expect: str, margin: float) -> str:
    if expect == "within":
        return f"between -{100 * margin:.2f}% and +{100 * margin:.2f}%"
    sign = "-" if expect == "less than" and margin else ""
    return f"{expect} {sign}{100 * margin:.2f}%"
