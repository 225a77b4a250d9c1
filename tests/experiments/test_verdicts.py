"""Verdicts of a study: by intervals, and never more than the data say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import helpers_evaluation
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ttest_ind

from raymaml.config.study import Comparison, FirstTrials, Precision
from raymaml.evaluation.paired import FEWEST_EPISODES
from raymaml.evaluation.records import RecordArrays
from raymaml.experiments.verdicts import Trainings, evidence_of, outcome, reach_verdicts
from raymaml.statistics.differences import half_width_interval
from raymaml.statistics.intervals import bounded_interval

UNDECIDED = "undecided at this size"


@pytest.mark.parametrize(
    ("low", "high", "expect", "margin", "expected"),
    [
        (0.01, 0.03, "more than", 0.0, "supported"),
        (0.01, 0.03, "more than", 0.03, "not supported"),
        (-0.03, -0.01, "less than", 0.02, UNDECIDED),
        (0.01, 0.03, "less than", 0.0, "not supported"),
        (-0.01, 0.02, "within", 0.03, "supported"),
        (-0.01, 0.02, "within", 0.02, UNDECIDED),
        (-0.05, -0.02, "within", 0.02, "not supported"),
        (-math.inf, math.inf, "more than", 0.0, UNDECIDED),
        (0.02, 0.02 + 1e-15, "more than", 0.0, UNDECIDED),
        (0.0, 0.0, "within", 0.1, UNDECIDED),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(low, high, expect, margin, expected) -> None:
    assert outcome(low, high, expect, margin) == expected


def test_the_half_width_of_fewer_trials_has_the_spread_of_all() -> None:
    values = np.tile([0.0, 1.0], 5000)  # s = 0.5 up to the divisor, m4 = s^4: no error of s
    found = half_width_interval(values, 600)
    # t(599, 0.975) = 1.96393
    assert found.mean == pytest.approx(1.96393 * 0.5 / math.sqrt(600), rel=1e-4)
    assert (found.low, found.high) == pytest.approx((found.mean, found.mean), rel=1e-3)
    for few, count in ((np.array([0.5]), 600), (values, 1)):  # nothing is known
        assert half_width_interval(few, count).high == math.inf


def test_the_interval_of_a_half_width_covers() -> None:
    # exponential values: s = 1, far from normal
    generator = np.random.default_rng(0)
    truth = 1.96393 / math.sqrt(600)
    hits = 0
    for _ in range(400):
        found = half_width_interval(generator.exponential(size=3000), 600)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 400 <= 0.97  # measured 0.93; an interval for normal values has 0.6


def arrays(accuracy: NDArray[np.float64]) -> RecordArrays:
    """Records of episodes of 12 classes, 3 in each, the same ones in every arm."""
    rows = np.argsort(np.random.default_rng(0).random((len(accuracy), 12)), 1)[:, :3]
    return helpers_evaluation.arrays(accuracy, rows)


def shifted(*shifts: float, seeds: Sequence[int] | None = None, count: int = 600) -> Trainings:
    """Trainings whose mean accuracy is 0.5 and their shift, exactly."""
    around = np.tile([-0.125, 0.125], count // 2)
    names = range(len(shifts)) if seeds is None else seeds
    return {seed: arrays(0.5 + shift + around) for seed, shift in zip(names, shifts, strict=True)}


def claim(expect: str = "more than", margin: float = 0.0, name: str = "c") -> Comparison:
    return Comparison(
        kind="difference", claim=name, arm="a", minus="b", expect=expect, margin=margin
    )


def noisy(shift: float, count: int = 600) -> NDArray[np.float64]:
    """Differences of a mean of ``shift`` and a standard deviation of 0.05."""
    return 0.5 + shift + np.tile([-0.05, 0.05], count // 2)


def test_a_verdict_on_a_method_rests_on_the_interval_over_trainings() -> None:
    # differences 2%, 3% and 4%: mean 3%, s 1%, t(0.975; 2) = 4.302653: 3% +- 2.484%.
    arms = {"a": shifted(0.02, 0.03, 0.04), "b": {seed: arrays(noisy(0)) for seed in range(3)}}
    (found,) = reach_verdicts([claim()], arms)
    assert (found.outcome, found.scope) == ("supported", "3 trainings of each, paired by seed")
    assert "over 3 trainings of each, paired by seed +0.52% to +5.48%; over 600 episodes" in (
        found.numbers
    )
    # t = 3% / (1% / sqrt(3)) = 5.19615: p = 2 * 0.017552
    assert found.p == pytest.approx(0.035099, abs=1e-6)
    # each model alone would be more than 1% above; what another training gives is not known so well
    assert reach_verdicts([claim(margin=0.01)], arms)[0].outcome == UNDECIDED


def test_one_training_is_a_verdict_on_that_model() -> None:
    found = [
        reach_verdicts([claim()], {"a": shifted(shift), "b": {0: arrays(noisy(0))}})[0]
        for shift in (0.02, -0.02)
    ]
    assert [each.outcome for each in found] == ["supported", "not supported"]
    assert {each.scope for each in found} == {"this model, not replicated"}
    assert all("seeds: [0, 1, 2]" in each.numbers for each in found)
    # the two trainings together: 0% +- 25%
    both = {"a": shifted(0.02, -0.02), "b": {seed: arrays(noisy(0)) for seed in (0, 1)}}
    assert reach_verdicts([claim()], both)[0].outcome == UNDECIDED


def test_trainings_of_other_seeds_are_compared_by_welch() -> None:
    one, other = [0.02, 0.03, 0.04], [0.0, 0.01]
    arms = {"a": shifted(*one), "b": {seed: arrays(noisy(s)) for seed, s in enumerate(other, 7)}}
    (found,) = reach_verdicts([claim()], arms)
    assert found.scope == "3 trainings against 2"
    assert found.p == pytest.approx(ttest_ind(one, other, equal_var=False).pvalue, abs=1e-6)


def test_both_intervals_must_agree() -> None:
    # Trainings that all gain 3%, within 0.1%, over episodes that differ by 0.5 either way: 60
    # episodes, on all of which the trainings agree, pin the gain down to 13%.
    episodes = np.tile([-0.45, 0.45], 30)
    ours = {seed: arrays(0.5 + 0.03 + 0.001 * seed + episodes) for seed in range(3)}
    arms = {"a": ours, "b": {seed: arrays(np.full(60, 0.5)) for seed in range(3)}}
    (found,) = reach_verdicts([claim()], arms)
    assert "paired by seed +2.85% to +3.35%" in found.numbers
    assert found.outcome == UNDECIDED


def test_the_claims_of_a_study_are_adjusted_by_holm() -> None:
    arms = {"a": shifted(0.02, 0.03, 0.04), "b": {seed: arrays(noisy(0)) for seed in range(3)}}
    one, other = reach_verdicts([claim(), claim(name="d")], arms)
    # 2 * 0.0351: what is decided alone is not among two
    assert one.p == other.p == pytest.approx(0.070198, abs=1e-6)
    assert (one.outcome, other.outcome) == (UNDECIDED, UNDECIDED)


@pytest.mark.parametrize(
    ("count", "decided"), [(2, False), (FEWEST_EPISODES - 2, False), (FEWEST_EPISODES, True)]
)
def test_few_episodes_decide_nothing(count: int, decided: bool) -> None:
    generator = np.random.default_rng(0)
    better = {0: arrays(0.8 + generator.normal(0, 0.01, count))}
    arms = {"a": better, "b": {0: arrays(np.full(count, 0.5))}}
    checks = [claim(), Precision(kind="precision", claim="p", arm="a", margin=0.5)]
    for found in reach_verdicts(checks, arms):
        assert (found.outcome != UNDECIDED) == decided, found
        assert ("no verdict rests on fewer than 60 episodes" in found.numbers) != decided


def first(count: int, expect: str = "more than", margin: float = 0.0) -> FirstTrials:
    return FirstTrials(
        kind="first trials", claim="f", arm="a", expect=expect, margin=margin, count=count
    )


@pytest.mark.parametrize(
    ("count", "decided"),
    [(59, False), (60, True), (540, True), (541, False), (700, False)],
)
def test_the_first_trials_and_the_others_must_both_be_enough(count: int, decided: bool) -> None:
    accuracy = np.tile([0.2, 0.4], 300)
    accuracy[:count] += 0.5
    (found,) = reach_verdicts([first(count)], {"a": {0: arrays(accuracy)}})
    assert (found.outcome != UNDECIDED) == decided, found
    assert ("no verdict rests on fewer than 60 episodes" in found.numbers) != decided
    assert "over 600 episodes" in found.numbers  # those that the claim is about


def test_the_interval_of_the_first_trials_squares_and_adds_two_intervals() -> None:
    accuracy = np.concatenate([np.tile([0.5, 1.0], 50), np.tile([0.25, 0.75], 250)])
    one, other = bounded_interval(accuracy[:100]), bounded_interval(accuracy[100:])
    found = evidence_of(first(100), {"a": {0: arrays(accuracy)}}).estimates[0](0.95)
    assert found.mean == pytest.approx(0.25)  # 0.75 - 0.5
    below, above = one.mean - one.low, one.high - one.mean
    assert found.low == pytest.approx(0.25 - math.sqrt(below**2 + (other.high - other.mean) ** 2))
    assert found.high == pytest.approx(0.25 + math.sqrt(above**2 + (other.mean - other.low) ** 2))


def test_first_trials_that_are_like_the_others_are_seldom_called_different() -> None:
    """At 99.8% of 15 queries; Welch's interval leaves 0 out in 16% of such campaigns."""
    generator = np.random.default_rng(7)
    wrong = 0
    for right in generator.binomial(15, 0.998, (1000, 600)):
        evidence = evidence_of(first(60), {"a": {0: arrays(right / 15)}})
        wrong += evidence.outcome(first(60), 0.95) != UNDECIDED
    assert wrong / 1000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("others", [(), (claim(),)])
def test_where_looks_decide_the_number_of_episodes_other_claims_are_open(others) -> None:
    """What is seen decides how many episodes there are; no interval of a fixed number holds."""
    accuracy = np.concatenate([np.tile([0.8, 1.0], 100), np.tile([0.1, 0.3], 200)])
    arms = {"a": {0: arrays(accuracy)}, "b": {0: arrays(np.tile([0.0, 0.1], 300))}}
    checks = [first(200), Precision(kind="precision", claim="p", arm="a", margin=0.01), *others]
    for early, outcomes in ((False, {"supported"}), (True, {UNDECIDED})):
        for found in reach_verdicts(checks, arms, stops_early=early)[:2]:
            assert {found.outcome} == outcomes
            assert (found.p == 1) == early
            assert ("evaluation.target_half_width" in found.numbers) == early


def test_an_interval_without_width_decides_nothing() -> None:
    same = {0: arrays(np.full(600, 0.5))}
    check = Precision(kind="precision", claim="p", arm="b", margin=0.01)
    for arm in (same, {0: arrays(np.tile([0.5, 0.5 + 1e-16], 300))}):  # alike up to rounding
        (found,) = reach_verdicts([check], {"b": arm})
        assert found.outcome == UNDECIDED
        assert "no verdict rests on an interval without width" in found.numbers


@pytest.mark.parametrize(("seeds", "by"), [((0, 1, 2), "paired by seed"), ((7, 8, 9), "against")])
def test_trainings_that_came_out_alike_decide_nothing(seeds: tuple[int, ...], by: str) -> None:
    """Each training of one arm is right in 4 queries of 75 more than its partner."""
    generator = np.random.default_rng(1)
    right = generator.integers(20, 60, (3, 600))
    if by == "against":  # the trainings of one arm then have one mean, up to rounding
        right = np.array([np.roll(right[0], 200 * shift) for shift in range(3)])
    theirs = {seed: arrays(each / 75) for seed, each in zip(seeds, right, strict=True)}
    ours = {seed: arrays((each + 4) / 75) for seed, each in enumerate(right)}
    (found,) = reach_verdicts([claim()], {"a": ours, "b": theirs})
    assert by in found.scope
    assert (found.outcome, found.p) == (UNDECIDED, 1)
    assert "+5.33%" in found.numbers  # 4 / 75
    assert " unknown; over 600 episodes" in found.numbers
    assert "trainings came out alike" in found.numbers


def test_one_side_of_trainings_that_came_out_alike_decides_nothing() -> None:
    same, other = shifted(0.3, 0.3, 0.3, seeds=(0, 1, 2)), shifted(0.0, 0.01, seeds=(7, 8))
    for arms in ({"a": same, "b": other}, {"a": other, "b": same}):
        (found,) = reach_verdicts([claim()], arms)
        assert (found.outcome, found.p) == (UNDECIDED, 1)
        assert "trainings came out alike" in found.numbers


def test_trainings_that_do_not_differ_are_seldom_said_to() -> None:
    """Trainings around one mean, s 2%, 3 a side; with one a side most verdicts are wrong."""
    generator = np.random.default_rng(5)
    wrong = {1: 0, 3: 0}
    for _ in range(200):
        a, b = (
            {s: arrays(0.5 + x + generator.normal(0, 0.05, 100)) for s, x in enumerate(drawn)}
            for drawn in generator.normal(0, 0.02, (2, 3))
        )
        for count in wrong:
            few = {"a": {s: a[s] for s in range(count)}, "b": {s: b[s] for s in range(count)}}
            wrong[count] += evidence_of(claim(), few).outcome(claim(), 0.95) != UNDECIDED
    assert wrong[1] / 200 > 0.4
    assert wrong[3] / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_where_looks_decide_the_number_of_episodes_the_interval_holds_at_any_look() -> None:
    """Differences of mean 0, s 5%, looked at after each of 60 to 400 episodes."""
    generator = np.random.default_rng(3)
    wrong = {True: 0, False: 0}
    for _ in range(40):
        a, b = 0.5 + generator.normal(0, 0.05, 400), np.full(400, 0.5)
        for early in wrong:
            wrong[early] += any(
                evidence_of(
                    claim(), {"a": {0: arrays(a[:n])}, "b": {0: arrays(b[:n])}}, stops_early=early
                ).outcome(claim(), 0.95)
                != UNDECIDED
                for n in range(60, 401, 20)
            )
    assert wrong[True] <= 2  # 5% of 40
    assert wrong[False] >= 4
