"""Drawn values: a function of seed, trial and key."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from raymaml.config.sweep import Dimension, SweepConfig
from raymaml.experiments.sweep import draw, draw_values, edges


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


def test_the_edges_are_each_bound_and_each_value_of_a_list() -> None:
    settings = sweep(SPACE)
    first = draw_values(settings, 0)
    found = list(edges(settings))
    assert len(found) == 4 * 2  # two bounds, or a list of two, for each of four keys
    assert found[0] == first | {"outer.lr": 1e-4}
    assert found[-1] == first | {"model.norm": "instance"}
