"""How far a mean over episodes carries: to new classes, and to tasks without common images.

Thousands of episodes are drawn from a few test classes and their images again and again. An
interval over episodes says how well so many episodes pin down the mean *over these*; it shrinks to
nothing while what is known of other classes does not (Lafargue et al. 2024, arXiv 2409.02850).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from raymaml.evaluation.statistics import Interval, mean_interval

RESAMPLES = 2_000


def new_classes_interval(
    accuracy: NDArray[np.float64],  # [E]
    class_ids: NDArray[np.int64],  # [E, N]
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean accuracy and its interval for classes drawn anew: a class-cluster bootstrap.

    The mean over all episodes is a U-statistic of degree N in the M classes (Hoeffding 1948). Each
    resample draws M classes with replacement, class c ``w_c`` times, and weighs an episode by the
    product of the ``w_c`` of its classes; to first order, which is all that is kept, that moves the
    mean by ``sum_c (w_c - 1) moved_c``, where ``moved_c`` is the sum over the episodes with class c
    of ``accuracy - mean``, over E. Three corrections make the variance of the resampled means that
    of the mean over classes drawn anew:

    - times ``M / (M - 1)``, as for any bootstrap of M things;
    - times ``((M - 1) / (M - N))**2``: an episode with class c has the others that much less often,
      so that what a class does shows too small in ``moved_c`` (Arvesen 1969);
    - less what the noise of single episodes puts in (``s**2`` around the sum of what the classes of
      an episode do): each is in N classes and counted so often, times these factors; once is right.

    The quantile is Student's with M - 1 degrees of freedom.

    ``count`` is the number of classes. Where all episodes have the same classes nothing is known of
    others: the half-width is infinite.

    Args:
        accuracy: of each episode.
        class_ids: the classes of each episode.
        level: probability to cover the mean over classes.
        seed: of the resamples.
    """
    episodes, ways = class_ids.shape
    classes, index = np.unique(class_ids, return_inverse=True)
    count, mean = len(classes), float(np.mean(accuracy))
    if count <= ways or not np.all(np.isfinite(accuracy)):
        width = math.inf if count <= ways else math.nan
        return Interval(
            mean=mean,
            low=mean - width,
            high=mean + width,
            half_width=width,
            std=math.nan,
            count=count,
        )
    residuals = np.repeat(accuracy - mean, ways)
    moved = np.bincount(index.ravel(), residuals, minlength=count) / episodes  # by one more draw
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    factor = count / (count - 1) * ((count - 1) / (count - ways)) ** 2
    noise = _noise(accuracy, index.reshape(episodes, ways)) / episodes
    variance = factor * float(np.var(draws @ moved)) - (factor * ways - 1) * noise
    # never less than of independent episodes: the classes cannot make the mean more certain
    variance = max(variance, float(np.var(accuracy, ddof=1)) / episodes)
    return _student(mean, math.sqrt(variance), count, level)


def _noise(accuracy: NDArray[np.float64], index: NDArray[np.int64]) -> float:
    """Return the variance of episodes around the sum of what their classes do (least squares)."""
    episodes, count = len(accuracy), int(index.max()) + 1
    design = np.zeros((episodes, count))
    np.put_along_axis(design, index, 1.0, axis=1)
    centred = accuracy - accuracy.mean()
    effects = np.linalg.lstsq(design.T @ design, design.T @ centred, rcond=None)[0]
    left: NDArray[np.float64] = centred - design @ effects
    return float(np.square(left).sum()) / max(episodes - count, 1)


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
    accuracy: NDArray[np.float64], image_rows: NDArray[np.int64], level: float = 0.95
) -> Interval:
    """Return the mean and t interval over episodes that share no image.

    Sampling without replacement, as Lafargue et al. 2024 (arXiv 2409.02850) ask for: the interval
    for other images of these classes. ``count`` is the number of episodes that could be taken.
    """
    return mean_interval(accuracy[disjoint_tasks(image_rows)], level)


def _student(mean: float, error: float, count: int, level: float) -> Interval:
    from scipy import special

    width = float(special.stdtrit(count - 1, (1 + level) / 2)) * error
    return Interval(
        mean=mean,
        low=mean - width,
        high=mean + width,
        half_width=width,
        std=error * math.sqrt(count),
        count=count,
    )
