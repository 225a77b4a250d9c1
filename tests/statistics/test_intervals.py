"""Statistics against numbers worked out by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raymaml.statistics.intervals import mean_interval, quantiles, wilson_interval


def test_interval_of_four_numbers_by_hand() -> None:
    # mean 10/4; squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, so s^2 = 5/3;
    # t(0.975; 3) = 3.182446 (any table); half-width 3.182446 * sqrt(5/3) / sqrt(4).
    found = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.mean == 2.5
    assert found.count == 4
    assert found.std == pytest.approx(math.sqrt(5 / 3), rel=1e-12)
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert (found.low, found.high) == (2.5 - found.half_width, 2.5 + found.half_width)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_interval_agrees_with_scipy(level: float) -> None:
    values = np.random.default_rng(3).uniform(size=60)
    found = mean_interval(values, level)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_equal_values_have_no_width_and_one_value_has_no_end() -> None:
    values = np.full(3, 0.1)
    assert np.mean(values) != 0.1  # which is why it is a case of its own
    found = mean_interval(values)
    assert (found.mean, found.low, found.high) == (0.1, 0.1, 0.1)
    assert (found.half_width, found.std, found.count) == (0.0, 0.0, 3)
    found = mean_interval(np.array([0.4]))
    assert (found.mean, found.low, found.high) == (0.4, -math.inf, math.inf)
    assert found.half_width == math.inf
    assert math.isnan(found.std)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_nothing_defined(bad: float) -> None:
    values = np.array([1.0, bad, 2.0])
    numbers = vars(mean_interval(values))
    assert {name for name, number in numbers.items() if not math.isnan(number)} == {"count"}
    assert all(map(math.isnan, quantiles(values).values()))


def test_only_a_row_of_values_and_a_level_between_0_and_1_are_taken() -> None:
    for values in (np.array([]), np.zeros((2, 2))):
        for function in (mean_interval, quantiles):
            with pytest.raises(ValueError, match="expected values of shape"):
                function(values)
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="level is"):
            mean_interval(np.array([1.0, 2.0]), level)


def test_quantiles_lie_on_the_line_between_order_statistics() -> None:
    # Positions p * 4 of 0, 10, 20, 30, 40: 0.2 -> 2, 1 -> 10, 2 -> 20, 3 -> 30, 3.8 -> 38.
    found = quantiles(np.array([40.0, 0.0, 30.0, 10.0, 20.0]))
    assert list(found) == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert list(found.values()) == pytest.approx([2, 10, 20, 30, 38], rel=1e-12)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (7, 10), (1, 1), (45, 50)])
def test_wilson_interval_agrees_with_scipy(successes: int, count: int) -> None:
    found = wilson_interval(successes, count)
    wanted = stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.mean == successes / count
    assert found.count == count


def test_wilson_interval_needs_trials() -> None:
    for successes, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="trials cannot succeed"):
            wilson_interval(successes, count)
