"""Whether a difference is more than chance, and how several such questions share one level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_EXACT = 200
"""Number of differences other than 0 up to which Wilcoxon's p-value is exact. It takes 0.03 s."""


def signed_rank_p(differences: NDArray[np.int64]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 where all are 0.

    Differences of 0 are left out, and sizes that are equal have their average rank. Up to
    ``MOST_EXACT`` others the p-value is exact, with equal sizes too: the share of all choices of
    signs whose sum of ranks is as far from its mean, or further. Of more it is that of a normal
    distribution with the variance that equal sizes leave (``scipy.stats.wilcoxon``).
    """
    from scipy import stats

    others = differences[differences != 0]
    if len(others) > MOST_EXACT:
        return float(stats.wilcoxon(others, method="asymptotic").pvalue)
    ranks = np.rint(2 * stats.rankdata(np.abs(others))).astype(np.int64)  # whole: average ranks x 2
    chances = np.ones(1)  # of each sum of the ranks above 0
    for rank in ranks:
        chances = (np.pad(chances, (rank, 0)) + np.pad(chances, (0, rank))) / 2
    from_mean = np.abs(2 * np.arange(len(chances)) - ranks.sum())
    return float(chances[from_mean >= from_mean[ranks[others > 0].sum()]].sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): below 5%, all hold at once.

    The i-th smallest of m, counted from 1, is multiplied by ``m - i + 1``; none is less than one
    before it, and none is above 1.
    """
    found = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(found, kind="stable")
    scaled = found[order] * np.arange(len(found), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted[np.argsort(order)]]
