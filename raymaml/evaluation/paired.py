"""Two arms on the same episodes: their difference, episode by episode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.data.sampling import by_label
from raymaml.evaluation.records import RecordArrays
from raymaml.statistics.intervals import Interval, bounded_interval
from raymaml.statistics.new_classes import new_classes_interval
from raymaml.statistics.significance import signed_rank_p

FEWEST_EPISODES = 60
"""No verdict rests on fewer. An event of one episode in 20 is missing from all of 59 episodes
in 5% of campaigns (0.95**59). Then neither an interval nor a p-value shows it."""
_PARTS = 1000
"""Accuracies are rounded to this part of a query."""
_REMEDY = "judge both on the same episodes"


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The differences of two arms."""

    difference: Interval
    """Mean difference in accuracy and its ``bounded_interval`` over episodes."""
    new_classes: Interval
    """The same difference and its interval for other classes."""
    wins: int
    """Episodes in which the first arm is better..."""
    ties: int
    losses: int
    """...and in which the second is."""
    sign_p: float
    """Two-sided p-value of the sign test: wins and losses are equally likely."""
    wilcoxon_p: float
    """Two-sided p-value of Wilcoxon's signed-rank test: differences are symmetric around 0."""

    @property
    def allows_a_verdict(self) -> bool:
        """Whether the arms may be called different, or alike: ``FEWEST_EPISODES``, and a width."""
        found = self.difference
        return found.count >= FEWEST_EPISODES and found.low < found.high


def paired(a: RecordArrays, b: RecordArrays, names: tuple[str, str]) -> Paired:
    """Compare two arms on the episodes that both were judged on.

    Differences are counted in whole queries, so that equal ones are ties; as numbers in 0..1 they
    differ by rounding. Where the arms have different numbers of queries, both are counted in their
    least common multiple.

    The sign test is exact (binomial, ties left out). Wilcoxon's test is that of
    ``signed_rank_p``.

    Raises:
        UserError: the episodes of one number are not the same in both: images of other banks, other
            classes or support images, or query images whose sets do not begin alike.
    """
    from scipy import stats

    _, in_a, in_b = np.intersect1d(a.episode, b.episode, assume_unique=True, return_indices=True)
    a, b = a.take(in_a), b.take(in_b)
    _require_same_episodes(a, b, names)
    unit = math.lcm(a.query_rows.shape[1], b.query_rows.shape[1])
    counts = _counts(a, unit) - _counts(b, unit)
    differences = counts / (unit * _PARTS)
    wins, losses = int((counts > 0).sum()), int((counts < 0).sum())
    decided = wins + losses
    return Paired(
        difference=bounded_interval(differences, lowest=-1.0),
        new_classes=new_classes_interval(differences, a.class_ids, lowest=-1.0),
        wins=wins,
        ties=len(differences) - decided,
        losses=losses,
        sign_p=float(stats.binomtest(wins, decided).pvalue) if decided else 1.0,
        wilcoxon_p=signed_rank_p(counts),
    )


def _counts(arm: RecordArrays, unit: int) -> NDArray[np.int64]:
    """Return the right queries of episodes in thousandths, as if each had ``unit`` queries.

    Thousandths are whole queries for all that raymaml judges, in float32 too.
    """
    queries = arm.query_rows.shape[1]
    right = np.rint(arm.accuracy * queries * _PARTS)
    return np.asarray(right * (unit // queries), dtype=np.int64)


def _require_same_episodes(a: RecordArrays, b: RecordArrays, names: tuple[str, str]) -> None:
    """Check that the records are of the same episodes; they have the same numbers."""
    arms = " and ".join(names)
    if a.bank != b.bank:
        raise UserError(
            f"{arms}: were judged on images of different banks ({a.bank[:12]} and {b.bank[:12]}),"
            " so their difference says nothing",
            remedy=_REMEDY,
        )
    if not len(a.episode):
        raise UserError(f"{arms}: have no episode in common", remedy=_REMEDY)
    for what, ours, theirs in _shown(a, b):
        if ours.shape == theirs.shape and np.array_equal(ours, theirs):
            continue
        wrong = (ours != theirs).any(1) if ours.shape == theirs.shape else [True]
        raise UserError(
            f"{arms}: episode {a.episode[np.argmax(wrong)]} has other {what} in one than in the"
            " other, so their difference says nothing",
            remedy=_REMEDY,
        )


def _shown(
    a: RecordArrays, b: RecordArrays
) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the columns that must be equal; a later one may need the earlier ones to be."""
    yield "classes", a.class_ids, b.class_ids
    yield "support images", a.support_rows, b.support_rows
    yield "support labels", a.support_labels, b.support_labels
    # of fewer queries a class: the first ones
    ours, theirs = (
        by_label(arm.query_rows, arm.query_labels, arm.class_ids.shape[1]) for arm in (a, b)
    )
    fewer = min(ours.shape[2], theirs.shape[2])
    leading = [queries[..., :fewer].reshape(len(queries), -1) for queries in (ours, theirs)]
    yield "query images", leading[0], leading[1]
