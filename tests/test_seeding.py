"""Randomness is a function of names: pinned for ever, uniform, and free of history."""

from __future__ import annotations

import numpy as np
import pytest

from raymaml.seeding import bit_stream, draw_without_replacement, fold_in, uniform


def test_a_path_gives_this_very_seed_for_ever() -> None:
    # Episodes are named by these numbers: a change here makes every published result another one.
    assert fold_in(0, "episode", "train", 0) == 2956678405232999107
    assert bit_stream(0, "episode", "train", 0).random_raw(2).tolist() == [
        10287225685298636693,
        10606022433813168222,
    ]


def test_seeds_have_63_bits() -> None:
    seeds = [fold_in(0, index) for index in range(256)]
    assert min(seeds) >= 0
    assert 2**62 <= max(seeds) < 2**63  # the highest bit is used


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1), (0, "1")), ((0, "a", "b"), (0, "ab")), ((0, "a"), (1, "a")), ((0,), (0, ""))],
)
def test_different_paths_give_different_seeds(one: tuple[int, str], other: tuple[int, str]) -> None:
    assert fold_in(*one) != fold_in(*other)


@pytest.mark.parametrize(("population", "count"), [(1, 1), (7, 7), (100, 5), (100, 60), (9, 0)])
def test_a_draw_holds_distinct_numbers_of_the_population(population: int, count: int) -> None:
    drawn = draw_without_replacement(bit_stream(3, "x"), population, count)
    assert len(drawn) == count == len(set(drawn.tolist()))
    assert all(0 <= number < population for number in drawn)


def test_a_draw_of_fewer_is_a_prefix_of_a_draw_of_more() -> None:
    # 10 of 100 are picked out by partition, 60 of 100 by a full sort
    few, many = (
        draw_without_replacement(bit_stream(5, "x"), 100, count).tolist() for count in (10, 60)
    )
    assert few == many[:10]


def test_every_number_is_equally_likely_at_every_place() -> None:
    draws = np.array(
        [draw_without_replacement(bit_stream(0, index), 10, 3) for index in range(3000)]
    )
    for place in range(3):
        counts = np.bincount(draws[:, place], minlength=10)
        # 3000 draws, p = 1/10: mean 300, standard deviation sqrt(3000 * 0.09) = 16.4; 4.5 of them
        assert np.all(np.abs(counts - 300) < 74)


def test_uniform_numbers_fill_the_unit_interval() -> None:
    values = uniform(bit_stream(0, "u"), 10_000)
    assert values.min() >= 0
    assert values.max() < 1
    # the mean of 10,000 has standard deviation sqrt(1/12) / 100 = 0.0029
    assert abs(values.mean() - 0.5) < 0.012
    assert np.all(values * 2.0**53 == np.floor(values * 2.0**53))
