"""Intervals cover what they say they cover: over episodes, classes, images and looks."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from raymaml.statistics.confidence_sequence import (
    Stopping,
    any_look_interval,
    confidence_sequence,
)
from raymaml.statistics.intervals import Interval, bounded_interval, mean_interval
from raymaml.statistics.new_classes import (
    _noise,
    disjoint_tasks,
    disjoint_tasks_interval,
    new_classes_interval,
)

CAMPAIGNS = 1_000
TRUTH = 0.6


def covers(interval: Interval) -> bool:
    return interval.low <= TRUTH <= interval.high


def campaign(
    generator: np.random.Generator, *, ways: int, classes: int = 20, episodes: int = 600
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Accuracies [E] and classes [E, N]: a class is easy or hard (sd 0.05), and so are the others
    of an episode because of it (sd 0.015); the noise of an episode has sd 0.05. The mean is TRUTH.
    """
    own = generator.normal(0, 0.05, classes) / ways
    others = generator.normal(0, 0.015, classes) * (ways - 1) / ways
    ids = np.argsort(generator.random((episodes, classes)), 1)[:, :ways]
    noise = generator.normal(0, 0.05, episodes)
    return TRUTH + (own + others)[ids].sum(1) + noise, ids


@pytest.mark.parametrize("ways", [5, 2])
def test_the_interval_for_new_classes_covers_and_that_over_episodes_does_not(ways) -> None:
    generator = np.random.default_rng(5)
    hits = naive = 0
    for _ in range(CAMPAIGNS):
        accuracy, ids = campaign(generator, ways=ways)
        hits += covers(new_classes_interval(accuracy, ids))
        naive += covers(mean_interval(accuracy))
    assert 0.93 <= hits / CAMPAIGNS <= 0.97
    assert naive / CAMPAIGNS < 0.5  # 600 episodes of 20 classes are not 600 classes


def test_the_noise_of_an_episode_is_not_counted_once_for_each_of_its_classes() -> None:
    # Where classes do not differ the variance is that over episodes. Counted for each of 5 classes
    # it would be five times that and more, and the error 2.2 times as large; it is bounded from
    # below by that over episodes.
    generator = np.random.default_rng(6)
    ratios = []
    for _ in range(100):
        accuracy = generator.normal(TRUTH, 0.05, 600)
        ids = np.argsort(generator.random((600, 20)), 1)[:, :5]
        new, same = new_classes_interval(accuracy, ids), mean_interval(accuracy)
        ratios.append(new.std / math.sqrt(20) / (same.std / math.sqrt(600)))
    assert 1.0 < float(np.mean(ratios)) < 1.4


def test_the_interval_over_disjoint_tasks_covers() -> None:
    # An episode takes 20 of 2,000 images; each image is right with a chance of its own.
    generator = np.random.default_rng(2)
    hits = naive = 0
    for _ in range(CAMPAIGNS):
        right = generator.random(2000) < TRUTH  # whether this test set's image is ever right
        rows = generator.integers(0, 2000, (2000, 20))
        accuracy = right[rows].mean(1)
        hits += covers(disjoint_tasks_interval(accuracy, rows))
        naive += covers(mean_interval(accuracy))
    assert 0.93 <= hits / CAMPAIGNS <= 0.97
    assert naive / CAMPAIGNS < 0.9  # drawing the same images again adds nothing


def test_a_confidence_sequence_covers_at_every_look() -> None:
    generator = np.random.default_rng(3)
    hits = fixed = 0
    for _ in range(CAMPAIGNS):
        values = generator.binomial(15, 1 - 0.8 * generator.beta(2, 2, 2000)) / 15  # mean 0.6
        centre, half_width = confidence_sequence(values)
        hits += bool(np.all(np.abs(centre - TRUTH) <= half_width))
        n = np.arange(1, 2001)
        means = np.cumsum(values) / n
        margins = 1.96 * np.sqrt(np.maximum(np.cumsum(values**2) / n - means**2, 0) / n)
        fixed += bool(np.all((np.abs(means - TRUTH) <= margins)[99::100]))
    assert hits / CAMPAIGNS >= 0.95
    assert fixed / CAMPAIGNS < 0.9  # a t interval that is looked at 20 times does not


def test_a_confidence_sequence_by_hand() -> None:
    centre, half_width = confidence_sequence(np.array([1.0, 0.0]), level=0.95)
    budget = math.log(40)
    # l_1 = l_2 = 1/2, for sqrt(2 log 40 / (s^2 i log(1 + i))) > 1/2
    assert centre.tolist() == pytest.approx([1.0, 0.5])
    psi = math.log(2) - 0.5  # 4 psi(1/2)
    # v_1 = (1 - 1/2)^2; m_1 = 3/4, so v_2 = (0 - 3/4)^2
    first = (budget + 0.25 * psi) / 0.5
    second = (budget + (0.25 + 0.5625) * psi) / 1.0
    assert half_width.tolist() == pytest.approx([first, second])


def test_where_a_sequence_stands_is_its_last_interval() -> None:
    values = np.random.default_rng(9).binomial(15, 0.6, 500) / 15
    centre, half_width = confidence_sequence(values)
    found = any_look_interval(values)
    assert (found.mean, found.count) == (values.mean(), 500)
    assert (found.low, found.high) == (centre[-1] - half_width[-1], centre[-1] + half_width[-1])
    assert found.half_width == max(found.high - found.mean, found.mean - found.low)
    fixed = mean_interval(values)
    assert found.low < fixed.low < fixed.high < found.high  # the price of looking


def test_the_first_look_is_the_one_whose_shown_interval_is_narrow_enough() -> None:
    values = np.random.default_rng(3).binomial(15, np.linspace(0.9, 0.4, 3000)) / 15
    shown = {look: any_look_interval(values[:look]).half_width for look in range(100, 3001, 100)}
    needed = Stopping(target_half_width=0.05, most_episodes=5000).needed
    assert needed(values) == next(look for look in shown if shown[look] <= 0.05)
    assert needed(values[:50]) == 5000
    assert Stopping(target_half_width=1e-9, most_episodes=3000).needed(values) == 3000


def test_at_any_look_ends_stay_between_0_and_1() -> None:
    found = any_look_interval(np.ones(40))
    assert (found.mean, found.high) == (1.0, 1.0)
    assert 0 < found.low < bounded_interval(np.ones(40)).low
    assert any_look_interval(np.zeros(1)).high == 1.0


@pytest.mark.parametrize("values", [[1.1], [-0.1], [math.nan]])
def test_a_confidence_sequence_is_of_values_in_0_to_1(values) -> None:
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        confidence_sequence(np.array(values))


def test_of_other_classes_nothing_is_known_where_all_are_in_each_episode() -> None:
    ids = np.tile(np.arange(5), (10, 1))
    found = new_classes_interval(np.linspace(0, 1, 10), ids)
    assert (found.mean, found.half_width, found.count) == (pytest.approx(0.5), math.inf, 5)


def test_the_interval_for_new_classes_by_hand() -> None:
    # Every pair of 6 classes once, accuracy = sum of what its classes do: no noise is left.
    effects = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    ids = np.array([(a, b) for a in range(6) for b in range(a)])
    found = new_classes_interval(effects[ids].sum(1), ids)
    # N^2 / M of the variance of the effects, here 4 / 6 * 0.035
    error = math.sqrt(4 / 6 * np.var(effects, ddof=1))
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(error * math.sqrt(6), rel=1e-6)
    # uniform effects have G2 = -1.2: 1.5 * 6 / 0.8 > M - 1 degrees; t(0.975; 5) = 2.570582
    trials = 0.25 / error**2 * (1.959964 / 2.570582) ** 2
    assert found.low == pytest.approx(stats.beta.ppf(0.025, trials / 2, trials / 2 + 1), rel=1e-5)
    assert found.high == pytest.approx(1 - found.low)


def test_the_interval_for_new_classes_is_that_of_resampled_classes() -> None:
    """Draw classes with replacement, and weigh episodes by the product of their classes' draws."""
    generator = np.random.default_rng(7)
    effects = generator.normal(0, 0.1, 30)
    ids = np.array([(a, b) for a in range(30) for b in range(30) if a != b])
    accuracy = TRUTH + effects[ids].sum(1)  # no noise, which has a correction of its own
    draws = generator.multinomial(30, np.full(30, 1 / 30), 4_000)
    weights = draws[:, ids].prod(2)
    resampled = (weights @ accuracy) / weights.sum(1)
    error = np.std(resampled) * math.sqrt(30 / 29)
    # that a pair of one class drawn twice is no episode is what ((M - 1) / (M - N))^2 is for
    found = new_classes_interval(accuracy, ids)
    assert found.std / math.sqrt(30) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(
    ("episodes", "classes", "ways"),
    [(600, 20, 5), (30, 40, 2), (600, 1000, 5)],
)
def test_the_noise_is_that_of_dense_least_squares(episodes: int, classes: int, ways: int) -> None:
    generator = np.random.default_rng([episodes, classes])
    ids = np.argsort(generator.random((episodes, classes)), 1)[:, :ways]
    index = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
    effects = generator.normal(0, 0.1, classes)
    accuracy = generator.normal(TRUTH, 0.05, episodes) + effects[ids].mean(1)
    design = np.zeros((episodes, index.max() + 1))
    np.put_along_axis(design, index, 1.0, axis=1)
    centred = accuracy - accuracy.mean()
    left = centred - design @ np.linalg.lstsq(design, centred, rcond=None)[0]
    expected = np.square(left).sum() / max(episodes - design.shape[1], 1)
    assert _noise(accuracy, index) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_interval_for_new_classes_takes_memory_by_class_and_not_by_pair_of_classes() -> None:
    # a matrix of 15,000 x 15,000 classes has 1.8 GB; 6,000 episodes of 5 classes 30,000 entries
    generator = np.random.default_rng(2)
    ids = generator.integers(0, 4000, (6000, 5)) + 4000 * np.arange(5)  # 20,000, none twice
    accuracy = generator.binomial(75, 0.6, 6000) / 75
    tracemalloc.start()
    try:
        found = new_classes_interval(accuracy, ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.count > 15_000
    assert peak < 40e6


def test_disjoint_tasks_are_taken_in_order() -> None:
    rows = np.array([[0, 1], [1, 2], [2, 3], [0, 4], [4, 5]])
    assert disjoint_tasks(rows).tolist() == [0, 2, 4]
