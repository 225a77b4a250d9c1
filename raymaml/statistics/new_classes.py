"""How far a mean over episodes carries: to new classes, and to tasks without common images.

Thousands of episodes are drawn from a few test classes and their images again and again. An
interval over episodes says how well they pin down the mean *over these* classes. With more episodes
it shrinks to nothing, and other classes stay as unknown (Lafargue et al. 2024, arXiv 2409.02850).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import linalg

from raymaml.statistics.intervals import (
    Interval,
    bounded_interval,
    degrees_of_freedom,
    interval_within,
    symmetric_interval,
    widened,
)

_MOST_STEPS = 1000
"""Of least squares, so that time is in proportion to episodes times ways."""


def new_classes_interval(
    accuracy: NDArray[np.float64],  # [E]
    class_ids: NDArray[np.int64],  # [E, N]
    *,
    lowest: float = 0.0,
) -> Interval:
    """Return the mean accuracy and its 95% interval for other classes: a class-cluster bootstrap.

    The mean over all episodes is a U-statistic of degree N in the M classes (Hoeffding 1948). Each
    resample draws M classes with replacement, class c ``w_c`` times, and weighs an episode by the
    product of the ``w_c`` of its classes; to first order, which is all that is kept, that moves the
    mean by ``sum_c (w_c - 1) moved_c``, where ``moved_c`` is the sum over the episodes with class c
    of ``accuracy - mean``, over E. The ``w_c`` are multinomial and the ``moved_c`` add up to 0, so
    over all resamples this has the variance ``sum_c moved_c**2``: none need be drawn. Three
    corrections make it that of the mean over other classes:

    - times ``M / (M - 1)``, as for any bootstrap of M things;
    - times ``((M - 1) / (M - N))**2``: an episode with class c has the others that much less often,
      so that what a class does shows too small in ``moved_c`` (Arvesen 1969);
    - less what the noise of single episodes puts in (``s**2`` around the sum of what the classes of
      an episode do): it is counted in each of N classes, times these factors; once is right.

    Its ends are those of ``bounded_ends``; where all episodes are alike it is the interval of M
    values that are alike. It reaches as far as ``bounded_interval`` at both ends. The degrees of
    freedom are those of M values, times the share of the variance that the last correction leaves:
    a small difference of two large numbers is known the less (by simulation).

    ``count`` is the number of classes, ``std`` the standard error times its root. Where all
    episodes have the same classes nothing is known of others: the half-width is infinite.

    Args:
        accuracy: of each episode, or a difference of two.
        class_ids: the classes of each episode.
        lowest: least value that an episode may have, 0 for accuracies and -1 for differences; the
            highest is 1.
    """
    episodes, ways = class_ids.shape
    classes, index = np.unique(class_ids, return_inverse=True)
    count, mean = len(classes), float(np.mean(accuracy))
    if count <= ways or not np.all(np.isfinite(accuracy)):
        return symmetric_interval(mean, math.inf if count <= ways else math.nan, math.nan, count)
    residuals = np.repeat(accuracy - mean, ways)
    moved = np.bincount(index.ravel(), residuals, minlength=count) / episodes  # by one more draw
    factor = count / (count - 1) * ((count - 1) / (count - ways)) ** 2
    noise = _noise(accuracy, index.reshape(episodes, ways)) / episodes
    raw = factor * float(np.sum(moved**2))
    # never less than of independent episodes: the classes cannot make the mean more certain
    independent = float(np.var(accuracy, ddof=1)) / episodes
    variance = max(raw - (factor * ways - 1) * noise, independent)
    error, std = math.sqrt(variance), math.sqrt(variance * count)
    degrees = float(degrees_of_freedom(count, np.mean(moved**2), np.mean(moved**4)))
    degrees = max(degrees * min(variance / raw, 1.0), min(degrees, 2.0)) if raw else degrees
    same = bounded_interval(accuracy, lowest=lowest)
    found = interval_within(same.mean, error, std, count, degrees=degrees, lowest=lowest)
    return widened(found, same)


def _noise(accuracy: NDArray[np.float64], index: NDArray[np.int64]) -> float:
    """Return the variance of episodes around the sum of what their classes do (least squares).

    By LSMR (Fong and Saunders 2011): a step takes time and memory in proportion to ``index.size``.
    Tens of steps are enough; it takes many where there are about as many classes as episodes.
    """
    places = (index.ravel(), np.arange(0, index.size + 1, index.shape[1]))
    design = sparse.csr_array((np.ones(index.size), *places))  # [E, M]: 1 where the class is in it
    centred = accuracy - accuracy.mean()
    precise = {"atol": 1e-12, "btol": 1e-12, "conlim": 0}
    effects = linalg.lsmr(design, centred, **precise, maxiter=_MOST_STEPS)[0]
    left: NDArray[np.float64] = centred - design @ effects
    return float(np.square(left).sum()) / max(len(accuracy) - int(index.max()) - 1, 1)


def disjoint_tasks(image_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which episodes, taken in their order, share no image with one taken before.

    Args:
        image_rows: all images of each episode: [E, I].
    """
    used = np.zeros(int(image_rows.max()) + 1, dtype=np.bool_)
    chosen = []
    for episode, rows in enumerate(image_rows):
        if not used[rows].any():
            used[rows] = True
            chosen.append(episode)
    return np.array(chosen, dtype=np.int64)


def disjoint_tasks_interval(
    accuracy: NDArray[np.float64], image_rows: NDArray[np.int64]
) -> Interval:
    """Return the mean and ``bounded_interval`` over episodes that share no image.

    Sampling without replacement, as Lafargue et al. 2024 (arXiv 2409.02850) ask for: the interval
    for other images of these classes. ``count`` is the number of episodes that could be taken.
    """
    return bounded_interval(accuracy[disjoint_tasks(image_rows)])
