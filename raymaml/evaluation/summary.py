"""One arm of a campaign in numbers, and arms against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.evaluation.generalisation import disjoint_tasks_interval, new_classes_interval
from raymaml.evaluation.paired import Paired, holm, paired
from raymaml.evaluation.records import RecordArrays
from raymaml.evaluation.sequences import any_look_interval
from raymaml.evaluation.statistics import (
    Interval,
    Summary,
    bounded_ends,
    bounded_interval,
    degrees_of_freedom,
    interval_by_step,
    mean_interval,
    over_trainings,
    summarize,
    widened,
)

WORST = 0.01
"""Share of the episodes that count as the worst."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far probabilities are what they say (Guo et al. 2017)."""

    error: float
    """Expected calibration error: mean of |confidence - accuracy| over bins, by queries."""
    confidence: list[float]
    """Mean confidence of the queries of each bin that has any..."""
    accuracy: list[float]
    """...the share of them that is classified rightly..."""
    count: list[int]
    """...and their number."""


LOOK = 100
"""Episodes after which an arm may be seen to be precise enough, and again after as many."""


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """How the number of an arm's episodes is decided by what is seen."""

    target_half_width: float
    """Judging ends at the first look at which the accuracy is known to this, 0..1."""
    most_episodes: int

    def sentence(self, count: int) -> str:
        """Say where judging ended, after ``count`` episodes."""
        looks = f"look {-(-count // LOOK)} of at most {-(-self.most_episodes // LOOK)}"
        if count < self.most_episodes:
            return (
                f"judging stopped early, at {looks}, by"
                f" evaluation.target_half_width={self.target_half_width:g}"
            )
        return f"judging did not stop early: it ended at {looks}"


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm of a campaign, in numbers."""

    name: str
    description: str
    """What was judged, one sentence."""
    protocol: str
    accuracy: Summary
    loss: Summary
    brier: Summary
    by_step: list[Interval]
    """Accuracy after 0, 1, .. T inner steps."""
    loss_by_step: list[Interval]
    any_look: Interval
    """Where a confidence sequence for the mean accuracy stands."""
    stopping: Stopping | None
    """Where there is one, the intervals over episodes hold at any look."""
    new_classes: Interval
    """Mean accuracy, with the interval for classes drawn anew."""
    disjoint_tasks: Interval
    """Mean accuracy over episodes that share no image."""
    skew: float
    """Of the accuracies: below 0 the few are far below the many."""
    worst: float
    """Mean accuracy of the worst 1% of the episodes (conditional value at risk)."""
    calibration: Calibration
    seconds: float
    """Median time an episode, adapting and judging."""
    total_seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against another on the same episodes."""

    arm: str
    minus: str
    result: Paired | None
    """None: they were not judged on the same episodes..."""
    refusal: str = ""
    """...and how they differ."""
    adjusted_p: float = 1.0
    """Of Wilcoxon's test, by Holm over all comparisons of the report."""


@dataclass(frozen=True, kw_only=True)
class Replicated:
    """The trainings of an arm, in numbers."""

    arms: Mapping[int, str]
    """Names of its trainings, by seed."""
    accuracy: Interval
    """Mean accuracy, and its interval by ``over_trainings``; ``count`` is theirs."""
    over_episodes: float
    """Mean half-width of the interval over episodes of one training."""


def replicated(
    trainings: Mapping[str, Mapping[int, str]], summaries: Sequence[ArmSummary]
) -> dict[str, Replicated]:
    """Summarise the arms that were trained more than once.

    Args:
        trainings: names of the summaries of an arm, by seed.
        summaries: of all trainings.
    """
    overall = {each.name: each.accuracy.overall for each in summaries}
    return {
        arm: Replicated(
            arms=names,
            accuracy=over_trainings([overall[name].mean for name in names.values()]),
            over_episodes=float(np.mean([overall[name].half_width for name in names.values()])),
        )
        for arm, names in trainings.items()
        if len(names) > 1
    }


def summarize_arm(
    name: str,
    description: str,
    protocol: str,
    records: RecordArrays,
    stopping: Stopping | None = None,
) -> ArmSummary:
    """Summarise the records of one arm."""
    over_episodes = bounded_interval if stopping is None else any_look_interval
    accuracy = summarize(records.accuracy, interval=over_episodes)
    new_classes = new_classes_interval(records.accuracy, records.class_ids)
    rows = np.concatenate([records.support_rows, records.query_rows], axis=1)
    return ArmSummary(
        name=name,
        description=description,
        protocol=protocol,
        accuracy=accuracy,
        loss=summarize(records.loss, interval=mean_interval),
        brier=summarize(records.brier, interval=partial(bounded_interval, highest=2.0)),
        by_step=interval_by_step(records.accuracy_by_step, over_episodes),
        loss_by_step=interval_by_step(records.loss_by_step, mean_interval),
        any_look=any_look_interval(records.accuracy),
        stopping=stopping,
        new_classes=widened(new_classes, accuracy.overall),
        disjoint_tasks=disjoint_tasks_interval(records.accuracy, rows),
        skew=skew(records.accuracy),
        worst=worst_mean(records.accuracy),
        calibration=calibration(records),
        seconds=float(np.median(records.seconds)),
        total_seconds=float(records.seconds.sum()),
    )


def skew(values: NDArray[np.float64]) -> float:
    """Return the sample skewness ``G1 = sqrt(n (n - 1)) / (n - 2) m3 / m2**1.5``; nan where n < 3.

    It is 0 where all values are equal.
    """
    from scipy import stats

    if len(values) < 3:
        return float("nan")
    return 0.0 if np.all(values == values[0]) else float(stats.skew(values, bias=False))


def worst_mean(values: NDArray[np.float64], share: float = WORST) -> float:
    """Return the mean of the lowest ``share`` of ``values``, of one at least.

    The conditional value at risk of Rockafellar and Uryasev 2000, for whole numbers of episodes.
    """
    count = max(1, int(np.ceil(share * len(values))))
    return float(np.mean(np.partition(values, count - 1)[:count]))


def running_mean(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of the first n of accuracies, and the ends of its interval, for every n: [E].

    The interval is ``bounded_interval``'s, from running sums of powers.
    """
    n = np.arange(1, len(values) + 1)
    centre = values.mean()  # so that powers do not cancel
    first, second, third, fourth = (np.cumsum((values - centre) ** k) / n for k in (1, 2, 3, 4))
    equal = np.maximum.accumulate(values) == np.minimum.accumulate(values)
    variance = np.where(equal, 0.0, np.maximum(second - first**2, 0.0))
    about_mean = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    degrees = degrees_of_freedom(n, variance, np.maximum(about_mean, variance**2))
    means = np.clip(np.where(equal, values, centre + first), 0.0, 1.0)
    low, high = bounded_ends(means, np.sqrt(variance / np.maximum(n - 1, 1)), degrees, n)
    return means, np.minimum(low, means), np.maximum(high, means)


def calibration(records: RecordArrays) -> Calibration:
    """Compare confidence and accuracy, bin by bin, over all queries of all episodes."""
    count = records.bin_count.sum(0)
    some = count > 0
    confidence = records.bin_confidence.sum(0)[some] / count[some]
    accuracy = records.bin_correct.sum(0)[some] / count[some]
    error = float((count[some] * np.abs(confidence - accuracy)).sum() / count.sum())
    return Calibration(
        error=error,
        confidence=confidence.tolist(),
        accuracy=accuracy.tolist(),
        count=count[some].tolist(),
    )


def compare(
    arms: Mapping[str, RecordArrays], trainings: Mapping[str, Mapping[int, str]]
) -> list[Comparison]:
    """Compare every arm with the first, where both were judged on the same episodes.

    A training of an arm is compared with that of the first arm that has its seed, if there is one.
    """
    first, *_ = arms
    ours: Mapping[int, str] = next(iter(trainings.values()), {})
    of_seed = {name: ours.get(seed, first) for t in trainings.values() for seed, name in t.items()}
    others = [name for name in arms if name != first and name not in ours.values()]
    found = [_compare(of_seed.get(other, first), other, arms) for other in others]
    results = [each.result for each in found if each.result is not None]
    adjusted = iter(holm([result.wilcoxon_p for result in results]))
    return [
        each if each.result is None else replace(each, adjusted_p=next(adjusted)) for each in found
    ]


def _compare(first: str, other: str, arms: Mapping[str, RecordArrays]) -> Comparison:
    try:
        result = paired(arms[other], arms[first], (other, first))
    except UserError as error:
        return Comparison(arm=other, minus=first, result=None, refusal=str(error))
    return Comparison(arm=other, minus=first, result=result)


def worst_episodes(records: RecordArrays, count: int) -> Sequence[int]:
    """Return where the worst episodes stand: lowest accuracy, then highest loss, first."""
    order: list[int] = np.lexsort((-records.loss, records.accuracy))[:count].tolist()
    return order
