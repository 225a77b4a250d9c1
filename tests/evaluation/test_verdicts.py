"""Verdicts of a study: by intervals, and never more than the data say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raymaml.evaluation.verdicts import half_width_interval, outcome

UNDECIDED = "undecided at this size"


@pytest.mark.parametrize(
    ("low", "high", "expect", "margin", "expected"),
    [
        (0.01, 0.03, "more than", 0.0, "supported"),
        (0.01, 0.03, "more than", 0.01, UNDECIDED),
        (0.01, 0.03, "more than", 0.03, "not supported"),
        (-0.03, -0.01, "less than", 0.0, "supported"),
        (-0.03, -0.01, "less than", 0.02, UNDECIDED),
        (0.01, 0.03, "less than", 0.0, "not supported"),
        (-0.01, 0.02, "within", 0.03, "supported"),
        (-0.01, 0.02, "within", 0.02, UNDECIDED),
        (0.02, 0.03, "within", 0.02, "not supported"),
        (-0.05, -0.02, "within", 0.02, "not supported"),
        (-math.inf, math.inf, "more than", 0.0, UNDECIDED),
        (math.nan, math.nan, "within", 0.5, UNDECIDED),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(low, high, expect, margin, expected) -> None:
    assert outcome(low, high, expect, margin) == expected


def test_the_half_width_of_fewer_trials_has_the_spread_of_all() -> None:
    values = np.tile([0.0, 1.0], 5000)  # s = 0.5 up to the divisor, m4 = s^4: no error of s
    half, low, high = half_width_interval(values, 600)
    # t(599, 0.975) = 1.96393
    assert half == pytest.approx(1.96393 * 0.5 / math.sqrt(600), rel=1e-4)
    assert (low, high) == pytest.approx((half, half), rel=1e-3)


def test_the_interval_of_a_half_width_covers() -> None:
    # exponential values: s = 1, far from normal
    generator = np.random.default_rng(0)
    truth = 1.96393 / math.sqrt(600)
    hits = 0
    for _ in range(400):
        _, low, high = half_width_interval(generator.exponential(size=3000), 600)
        hits += low <= truth <= high
    assert 0.90 <= hits / 400 <= 0.97  # measured 0.93; an interval for normal values has 0.6


def test_of_one_value_nothing_is_decided() -> None:
    for values, count in ((np.array([0.5]), 600), (np.array([0.5, 0.75]), 1)):
        _, low, high = half_width_interval(values, count)
        assert outcome(low, high, "more than", 0.01) == UNDECIDED
