"""Drawn values: a function of seed, trial and key."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from raymaml.config.sweep import Dimension, Pbt, SweepConfig
from raymaml.evaluation.population import comparisons, donors
from raymaml.evaluation.search_space import draw, draw_values, move, perturb, to_position

PBT = Pbt(kind="pbt", perturb_every=5, factors=(0.5, 2.0))


def sweep(space: dict[str, Any], **more: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {"name": "s", "title": "T", "config": "c.yaml", "space": space, "num_trials": 4, **more}
    )


SPACE = {
    "outer.lr": {"log_uniform": [1e-4, 1e-1]},
    "inner.lr": {"uniform": [0.1, 0.5]},
    "inner.num_steps": {"integer": [1, 3]},
    "model.norm": {"choice": ["context", "instance"]},
}


def test_more_trials_and_other_keys_change_nothing() -> None:
    few, many = sweep(SPACE), sweep(SPACE | {"inner.momentum": {"uniform": [0, 0.9]}}, num_trials=9)
    for trial in range(4):
        before, after = draw_values(few, trial), draw_values(many, trial)
        assert {key: after[key] for key in before} == before
    assert draw_values(few, 0) != draw_values(few, 1)
    assert draw_values(few, 0) != draw_values(sweep(SPACE, seed=1), 0)


def test_values_are_spread_as_the_space_says() -> None:
    found = [draw_values(sweep(SPACE), trial) for trial in range(400)]
    logs = np.log10([values["outer.lr"] for values in found])
    # the mean of 400 uniform numbers over a width of 3 has a standard error of 0.0433
    assert abs(logs.mean() + 2.5) < 0.15
    assert (logs.min() >= -4, logs.max() <= -1) == (True, True)
    assert abs(np.mean([values["inner.lr"] for values in found]) - 0.3) < 0.02
    counts = Counter(values["inner.num_steps"] for values in found)
    assert sorted(counts) == [1, 2, 3]
    assert min(counts.values()) > 133 - 4 * 9.4  # sqrt(400 * 1/3 * 2/3)
    assert Counter(values["model.norm"] for values in found)["context"] in range(160, 241)


def test_the_ends_of_a_dimension() -> None:
    almost = 1 - 2**-53
    integer = Dimension(integer=(2, 4))
    assert [draw(integer, unit) for unit in (0.0, 0.34, almost)] == [2, 3, 4]
    log = Dimension(log_uniform=(1e-3, 1e-1))
    assert [draw(log, unit) for unit in (0.0, 0.5, almost)] == [0.001, 0.01, 0.1]
    assert draw(Dimension(choice=("a", "b")), almost) == "b"
    assert draw(Dimension(uniform=(0, 3)), 1 / 3) == 1.0


def test_grids_are_crossed_and_go_round() -> None:
    space = {"inner.lr": {"grid": [1, 2]}, "model.norm": {"grid": ["a", "b", "c"]}}
    settings = sweep(space, num_trials=None)
    found = [tuple(draw_values(settings, trial).values()) for trial in range(7)]
    assert sorted(found[:6]) == [(lr, norm) for lr in (1, 2) for norm in ("a", "b", "c")]
    assert found[6] == found[0]


@pytest.mark.parametrize(
    ("dimension", "value", "down", "up"),
    [
        (Dimension(uniform=(0, 10)), 3.0, 1.5, 6.0),
        (Dimension(uniform=(2, 5)), 3.0, 2.0, 5.0),
        (Dimension(log_uniform=(1e-3, 1)), 0.1, 0.05, 0.2),
        (Dimension(integer=(1, 20)), 8, 4, 16),
        (Dimension(integer=(1, 3)), 1, 1, 2),  # 0.5 rounds to 0; at least 1
        (Dimension(choice=("a", "b", "c")), "b", "a", "c"),
        (Dimension(choice=("a", "b")), "a", "a", "b"),
    ],
)
def test_a_perturbed_value_is_a_neighbour(
    dimension: Dimension, value: Any, down: Any, up: Any
) -> None:
    assert move(dimension, value, (0.5, 2.0), up=False) == down
    assert move(dimension, value, (0.5, 2.0), up=True) == up


def test_a_perturbation_is_a_function_of_trial_and_step_and_spares_the_model() -> None:
    settings = sweep(SPACE, scheduler=PBT)
    values = draw_values(settings, 0)
    found = [
        perturb(settings, PBT, values, trial=trial, step=step)
        for trial in range(8)
        for step in (5, 10)
    ]
    again = perturb(settings, PBT, values, trial=7, step=10)
    assert found[-1] == again
    assert {each["model.norm"] for each in found} == {values["model.norm"]}
    assert len({each["outer.lr"] for each in found}) > 2  # redrawn, or half, or double
    assert all(1e-4 <= each["outer.lr"] <= 1e-1 for each in found)
    moved = [values["outer.lr"] * factor for factor in PBT.factors]
    near = [any(each["outer.lr"] == pytest.approx(m, rel=1e-5) for m in moved) for each in found]
    assert 0 < sum(near) < len(found)


def test_positions_on_an_axis() -> None:
    assert to_position(Dimension(log_uniform=(1e-4, 1)), 1e-2) == pytest.approx(0.5)
    assert to_position(Dimension(integer=(1, 5)), 2) == 0.25
    assert to_position(Dimension(choice=("a", "b", "c")), "c") == 1.0
    assert to_position(Dimension(grid=("a",)), "a") == 0.5


def test_the_worst_go_on_from_the_best() -> None:
    pbt = Pbt(kind="pbt", perturb_every=5, quantile=0.4)
    accuracies = {0: 0.5, 1: 0.9, 2: 0.7, 3: 0.9, 4: 0.1}  # int(5 * 0.4) = 2
    found = donors(accuracies, pbt, seed=0, step=5)
    assert sorted(found) == [0, 4]
    assert set(found.values()) <= {1, 3}
    assert found == donors(dict(reversed(accuracies.items())), pbt, seed=0, step=5)
    many = [donors(accuracies, pbt, seed=0, step=step)[4] for step in range(40)]
    assert set(many) == {1, 3}


def test_of_equal_trials_the_one_with_the_larger_number_is_replaced() -> None:
    pbt = Pbt(kind="pbt", perturb_every=5, quantile=0.25)
    assert donors(dict.fromkeys(range(4), 0.5), pbt, seed=0, step=5) == {3: 0}
    assert donors({1: 0.5, 2: 0.4, 3: 0.3}, pbt, seed=0, step=5) == {}  # int(0.75): one failed


def test_trials_are_compared_up_to_the_end() -> None:
    assert list(comparisons(PBT, 15)) == [5, 10, 15]
    assert list(comparisons(PBT, 17)) == [5, 10, 15, 17]
