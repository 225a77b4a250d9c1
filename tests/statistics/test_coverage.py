"""The 95% interval covers, at the ceiling too, and is no wider than it must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers_coverage import (
    ACCURACIES,
    DIFFERENCES,
    EPISODES,
    ERROR,
    QUERIES,
    SPREADS,
    accuracy_cell,
    difference_cell,
)

from raymaml.statistics.intervals import (
    bounded_ends,
    bounded_interval,
    degrees_of_freedom,
)
from raymaml.statistics.new_classes import new_classes_interval

LEAST = 0.95 - 4 * ERROR  # 93.05%: of 1,000 cells of exactly 95% not one is expected below


@pytest.mark.parametrize(
    ("spread", "least"),
    [(SPREADS[0], LEAST), (SPREADS[1], LEAST), (SPREADS[2], 0.93 - 4 * ERROR)],
)
def test_the_interval_covers_at_every_accuracy_and_size(spread: float, least: float) -> None:
    cells = [
        accuracy_cell(*kind, spread) for kind in itertools.product(ACCURACIES, QUERIES, EPISODES)
    ]
    assert len(cells) == 8 * 3 * 8
    assert {cell.name: cell.covered for cell in cells if cell.covered < least} == {}


def test_the_interval_of_a_difference_covers_where_arms_hardly_differ() -> None:
    cells = [
        difference_cell(*chances, queries, episodes)
        for chances, queries, episodes in itertools.product(DIFFERENCES, (5, 75), EPISODES)
    ]
    assert {cell.name: cell.covered for cell in cells if cell.covered < LEAST} == {}


def test_student_s_t_does_not_cover_at_the_ceiling() -> None:
    # All 200 queries are right in 0.998^200 = 67% of campaigns, and then t has no width.
    cell = accuracy_cell(0.998, 5, 40, 0.0)
    assert cell.covered_by_t == pytest.approx(1 - 0.998**200, abs=0.042)  # 4 (0.33 0.67 / 2000)^0.5
    assert cell.covered >= LEAST


def test_far_from_the_ends_it_is_as_wide_as_student_s_t() -> None:
    for accuracy, queries in itertools.product((0.5, 0.8, 0.95, 0.98), QUERIES):
        assert 0.99 < accuracy_cell(accuracy, queries, 600, 0.0).width_ratio < 1.06
        assert 0.99 < accuracy_cell(accuracy, queries, 6000, 0.05).width_ratio < 1.03


def test_the_simulated_interval_is_that_of_the_report() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 4, 10, 600):
        values = generator.binomial(15, 0.93, count) / 15
        moments = [np.mean((values - values.mean()) ** power) for power in (2, 4)]
        ends = bounded_ends(
            values.mean(),
            np.sqrt(moments[0] / (count - 1)),
            degrees_of_freedom(count, *moments),
            count,
        )
        found = bounded_interval(values)
        assert (found.low, found.high) == pytest.approx((float(ends[0]), float(ends[1])))
        assert found.half_width == max(found.high - found.mean, found.mean - found.low)


def test_equal_values_by_hand() -> None:
    # What is not 100% has a chance of at most 1 - 0.025^(1/40) = 0.0881, or 40 would have shown it.
    found = bounded_interval(np.ones(40))
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 0.088097, abs=1e-6)
    # the rest of 2 episodes, 1 - 0.025^(1/2) = 0.841886, may be all wrong, or all right
    found = bounded_interval(np.full(2, 0.3))
    ends = (0.3 * (1 - 0.841886), 0.3 * (1 - 0.841886) + 0.841886)
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-6)
    # a difference of 0 everywhere: either way 2 * 0.088097 / 2
    found = bounded_interval(np.zeros(40), lowest=-1.0)
    assert (found.low, found.high) == pytest.approx((-0.088097, 0.088097), abs=1e-6)
    found = bounded_interval(np.array([1.0]))
    assert (found.mean, found.low, found.high) == (1.0, pytest.approx(0.025), 1.0)
    assert np.isnan(found.std)


def test_trials_that_succeed_or_fail_have_the_interval_of_clopper_and_pearson() -> None:
    # 400 of 1,000; s^2 = p (1 - p) n / (n - 1), so N = 999 times (1.959964 / t(0.975; 999))^2:
    # 996. Clopper and Pearson 1934 for 400 of 1,000, and thus about here: 36.9% to 43.1%.
    values = np.repeat([1.0, 0.0], [400, 600])
    found = bounded_interval(values)
    assert (found.low, found.high) == pytest.approx((0.3695, 0.4311), abs=5e-4)


def test_values_outside_of_the_range_are_refused_unless_by_rounding() -> None:
    for values in ([1.1], [-0.1, 0.5], [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"in 0\.\.1"):
            bounded_interval(np.array(values))
    found = bounded_interval(np.array([1.0000001, 1.0, 1.0]))
    assert (found.mean, found.high) == (1.0, 1.0)


def test_the_interval_for_new_classes_has_a_width_at_the_ceiling() -> None:
    ids = np.argsort(np.random.default_rng(0).random((600, 20)), 1)[:, :5]
    found = new_classes_interval(np.ones(600), ids)
    # classes that are not at 100% have a share of at most 1 - 0.025^(1/20) = 0.168433
    assert (found.low, found.high) == pytest.approx((1 - 0.168433, 1.0), abs=1e-6)
    nothing = new_classes_interval(np.zeros(600), ids, lowest=-1.0)
    assert (nothing.low, nothing.high) == pytest.approx((-0.168433, 0.168433), abs=1e-6)
    nearly = np.ones(600)
    nearly[7] = 0.8
    found = new_classes_interval(nearly, ids)
    same = bounded_interval(nearly)
    assert found.low <= same.low < found.mean < same.high <= found.high


@pytest.mark.parametrize(
    ("wrong", "alike", "episodes", "nominal"),
    [
        (0.4, 10, 600, 0.95),
        (0.4, 100, 600, 0.92),  # classes differ by a standard deviation of 5%, episodes by 13%
        (0.02, 20, 600, 0.95),
    ],
)
def test_the_interval_for_new_classes_covers_up_to_the_ceiling(
    wrong, alike, episodes, nominal
) -> None:
    # A class fails a query with a chance of its own, beta: the larger alike, the less they differ.
    generator, hits, campaigns = np.random.default_rng(4), 0, 400
    for _ in range(campaigns):
        chances = generator.beta(alike * wrong, alike * (1 - wrong), 24)
        ids = np.argsort(generator.random((episodes, 24)), 1)[:, :5]
        accuracy = 1 - generator.binomial(3, chances[ids]).sum(1) / 15
        found = new_classes_interval(accuracy, ids)
        hits += found.low <= 1 - wrong <= found.high
    # less 3 standard deviations of a binomial with 400 trials, (0.05 * 0.95 / 400)^0.5 = 1.1%
    assert hits / campaigns >= nominal - 3 * 0.011
