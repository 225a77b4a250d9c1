"""The content of ``summary.json``: the arms of a campaign in numbers, alone and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymaml.common.errors import UserError
from raymaml.common.untrusted import json_ready
from raymaml.evaluation.paired import paired
from raymaml.evaluation.records import RecordArrays
from raymaml.evaluation.results import ArmResult
from raymaml.statistics.confidence_sequence import any_look_interval
from raymaml.statistics.intervals import (
    FIRST_EPISODES,
    Interval,
    IntervalOf,
    bounded_interval,
    mean_interval,
    over_trainings,
    quantiles,
    widened,
)
from raymaml.statistics.new_classes import disjoint_tasks_interval, new_classes_interval
from raymaml.statistics.significance import holm

SCHEMA_VERSION = 3
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
WORST = 0.01
"""Share of the episodes that count as the worst."""
Numbers = dict[str, Any]
"""A part of ``summary.json``; its numbers may still be infinite or nan."""
Trainings = Mapping[str, Mapping[int, str]]
"""Names of the arms that are trainings of one model, by seed, under the name of the model."""


def summarize_arms(
    arms: Sequence[ArmResult],
    records: Mapping[str, RecordArrays],
    trainings: Trainings,
    class_names: Sequence[str] = (),
) -> Numbers:
    """Return the numbers of a report.

    Args:
        arms: the results, the model first.
        records: their records, by name of the arm.
        trainings: the models that were trained more than once.
        class_names: those of the bank; without any there are no numbers by class.
    """
    numbers = {arm.name: summarize_arm(arm, records[arm.name]) for arm in arms}
    main = numbers[arms[0].name]
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": _headline(main),
        **main,
        "arms": numbers,
        "trainings": {
            model: _replicated(names, numbers)
            for model, names in trainings.items()
            if len(names) > 1
        },
        "classes": by_class(records[arms[0].name], class_names) if class_names else [],
        "comparisons": _comparisons(records, trainings),
        "circumstances": {arm.name: arm.circumstances for arm in arms},
    }


def summarize_arm(arm: ArmResult, records: RecordArrays) -> Numbers:
    """Return the numbers of one arm.

    Where judging may have stopped early, intervals of accuracies hold at any look. ``skew`` is
    negative where a few episodes are far below the others; ``worst_1%`` is the mean accuracy of the
    worst episodes; ``seconds`` are those of adapting and judging.
    """
    over_episodes = bounded_interval if arm.stopping is None else any_look_interval
    accuracy = over_episodes(records.accuracy)
    new_classes = widened(new_classes_interval(records.accuracy, records.class_ids), accuracy)
    rows = np.concatenate([records.support_rows, records.query_rows], axis=1)
    steps = zip(records.accuracy_by_step.T, records.loss_by_step.T, strict=True)
    return {
        "description": arm.description,
        "protocol": str(arm.protocol),
        "num_episodes": accuracy.count,
        "stopping": arm.stopping and arm.stopping.ending(accuracy.count),
        "accuracy": {
            **_quantity(records.accuracy, over_episodes),
            "any_look": _interval(any_look_interval(records.accuracy)),
            "new_classes": _interval(new_classes, "num_classes"),
            "image_disjoint_tasks": _interval(disjoint_tasks_interval(records.accuracy, rows)),
            "skew": skew(records.accuracy),
            "worst_1%": worst_mean(records.accuracy),
        },
        "loss": _quantity(records.loss, mean_interval),
        "brier": _quantity(records.brier, partial(bounded_interval, highest=2.0)),
        "calibration": calibration(records),
        "accuracy_by_step": [
            {"step": step, **_interval(over_episodes(right)), "loss": mean_interval(loss).mean}
            for step, (right, loss) in enumerate(steps)
        ],
        "seconds": {
            "median": float(np.median(records.seconds)),
            "total": float(records.seconds.sum()),
        },
        "identity": json_ready(arm.identity),
    }


def skew(values: NDArray[np.float64]) -> float:
    """Return the sample skewness ``G1 = sqrt(n (n - 1)) / (n - 2) m3 / m2**1.5``; nan where n < 3.

    It is 0 where all values are equal.
    """
    if len(values) < 3:
        return math.nan
    return 0.0 if np.all(values == values[0]) else float(stats.skew(values, bias=False))


def worst_mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the lowest 1% of ``values``, at least of one.

    The conditional value at risk of Rockafellar and Uryasev 2000, for whole numbers of episodes.
    """
    return float(np.sort(values)[: max(1, math.ceil(WORST * len(values)))].mean())


def calibration(records: RecordArrays) -> Numbers:
    """Return how far confidence and accuracy agree, over the queries of all episodes.

    ``error`` is the expected calibration error (Guo et al. 2017): the mean of |confidence -
    accuracy| over bins, weighted by queries. The lists have an entry for each bin with queries.
    """
    count = records.bin_count.sum(0)
    some = count > 0
    confidence = records.bin_confidence.sum(0)[some] / count[some]
    accuracy = records.bin_correct.sum(0)[some] / count[some]
    error = float((count[some] * np.abs(confidence - accuracy)).sum() / count.sum())
    lists = {"confidence": confidence, "accuracy": accuracy, "count": count[some]}
    return {"error": error, **{name: values.tolist() for name, values in lists.items()}}


def by_class(records: RecordArrays, names: Sequence[str]) -> list[Numbers]:
    """Return the numbers of each class that was judged, the one with the lowest accuracy first.

    ``taken_for`` names up to three other classes, those that most of its queries were taken for;
    ``of`` is the number of its queries in episodes that hold the other class too. It is None where
    the records hold no predictions.
    """
    ids, inverse = np.unique(records.class_ids, return_inverse=True)
    place = inverse.reshape(records.class_ids.shape)  # [E, N]
    known = records.query_predictions >= 0
    mistaken = known & (records.query_predictions != records.query_labels)
    true, taken = (
        np.take_along_axis(place, np.maximum(labels, 0), 1)[mistaken]
        for labels in (records.query_labels, records.query_predictions)
    )
    both = place[known.any(1)]
    queries = records.query_labels.shape[1] // records.class_ids.shape[1]
    mistakes = _pairs(true, taken, len(ids))
    chances = queries * _pairs(both[:, :, None], both[:, None, :], len(ids))

    def numbers(at: int) -> Numbers:
        worst = np.argsort(-mistakes[at], kind="stable")[:3]
        others = [
            {"name": names[ids[other]], "queries": mistakes[at, other], "of": chances[at, other]}
            for other in worst[mistakes[at, worst] > 0]
        ]
        return {
            "name": names[ids[at]],
            "accuracy": _interval(bounded_interval(records.class_accuracy[place == at])),
            "taken_for": others if chances[at].any() else None,
        }

    return sorted(map(numbers, range(len(ids))), key=lambda each: each["accuracy"]["mean"])


def _pairs(first: NDArray[np.int64], second: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Count each pair of numbers below ``count``: [count, count]."""
    return np.bincount((first * count + second).ravel(), minlength=count**2).reshape(count, count)


def percent(interval: Numbers) -> str:
    """Write a mean accuracy and the half-width of its interval."""
    if not math.isfinite(interval["mean"]):
        return "undefined"
    return f"{interval['mean']:.2%} {PLUS_MINUS} {margin(interval, '.2%')}"


def margin(interval: Numbers, form: str) -> str:
    """Write the half-width of an interval."""
    return format(interval["ci95"], form) if math.isfinite(interval["ci95"]) else "unknown"


def _headline(main: Numbers) -> str:
    text = f"{percent(main['accuracy'])} accuracy on {main['num_episodes']:,} test episodes"
    if main["stopping"]:
        text += f"; {main['stopping']['text']}, and the interval holds at any look"
    return text


def _replicated(names: Mapping[int, str], arms: Mapping[str, Numbers]) -> Numbers:
    """Return the mean and the spread of the trainings of one model."""
    found = [arms[name]["accuracy"] for name in names.values()]
    return {
        "arms": names,
        "accuracy": _interval(over_trainings([each["mean"] for each in found]), "num_trainings"),
        "ci95_over_episodes": float(np.mean([each["ci95"] for each in found])),
    }


def _comparisons(arms: Mapping[str, RecordArrays], trainings: Trainings) -> list[Numbers]:
    """Compare every arm with the first, where both were judged on the same episodes.

    A training of a model is compared with the training of the first model that has its seed.
    """
    first, *_ = arms
    ours: Mapping[int, str] = next(iter(trainings.values()), {})
    of_seed = {name: ours.get(seed, first) for t in trainings.values() for seed, name in t.items()}
    others = [name for name in arms if name != first and name not in ours.values()]
    found = [_comparison(other, of_seed.get(other, first), arms) for other in others]
    compared = [each for each in found if "refusal" not in each]
    for each, p in zip(compared, holm([each["wilcoxon_p"] for each in compared]), strict=True):
        each["holm_p"] = p
    return found


def _comparison(arm: str, minus: str, arms: Mapping[str, RecordArrays]) -> Numbers:
    """Return the accuracy of an arm minus that of another, or why that would say nothing."""
    names: Numbers = {"arm": arm, "minus": minus}
    try:
        result = paired(arms[arm], arms[minus], (arm, minus))
    except UserError as error:
        return {**names, "refusal": str(error)}
    return {
        **names,
        **asdict(result),
        "difference": _interval(result.difference),
        "new_classes": _interval(result.new_classes, "num_classes"),
        "allows_a_verdict": result.allows_a_verdict,
    }


def _quantity(values: NDArray[np.float64], interval: IntervalOf) -> Numbers:
    return {
        **_interval(interval(values)),
        "first_600": _interval(interval(values[:FIRST_EPISODES])),
        "quantiles": {f"{p:.0%}": value for p, value in quantiles(values).items()},
        "num_nonfinite": int(np.count_nonzero(~np.isfinite(values))),
    }


def _interval(interval: Interval, counted: str = "num_episodes") -> Numbers:
    return {
        "mean": interval.mean,
        "ci95": interval.half_width,
        "interval95": [interval.low, interval.high],
        "std": interval.std,
        counted: interval.count,
    }
