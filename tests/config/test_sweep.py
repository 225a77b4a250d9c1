"""Sweep files: the forms of a space, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import load_sweep
from raymaml.config.sweep import Asha, NoScheduler, SweepConfig

SMALLEST = """\
name: s
title: T
config: c.yaml
"""
LR = "space: {outer.lr: {log_uniform: [1e-4, 1e-1]}}\n"
TWELVE = f"{LR}num_trials: 12\n"


def read(tmp_path: Path, text: str) -> SweepConfig:
    path = tmp_path / "s.yaml"
    path.write_text(SMALLEST + text, encoding="utf-8")
    return load_sweep(path)


def test_asha_is_the_default_and_a_name_alone_will_do(tmp_path: Path) -> None:
    assert read(tmp_path, TWELVE).scheduler == Asha(kind="asha")
    assert read(tmp_path, f"{TWELVE}scheduler: none\n").scheduler == NoScheduler(kind="none")


def test_grids_have_a_number_of_trials_themselves(tmp_path: Path) -> None:
    text = "space: {inner.lr: {grid: [0.1, 0.2]}, model.norm: {grid: [context, instance, layer]}}\n"
    assert read(tmp_path, text).count == 6
    assert read(tmp_path, f"{text}num_trials: 4\n").count == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{TWELVE}trials: 3\n", "s.yaml:6: trials is unknown; "),
        (LR, "num_trials is missing; only a space with a grid has a number itself"),
        (f"{LR}num_trials: 0\n", "s.yaml:5: num_trials is 0; it should be greater than or equal"),
        ("num_trials: 2\n", "s.yaml: space is missing; it has no default"),
        (
            "num_trials: 2\nspace:\n  outer.lr: {uniform: [0, 1], choice: [1]}\n",
            "s.yaml:6: space: a key has one of choice, grid, uniform, log_uniform, integer, as in"
            " {log_uniform: [1e-3, 1e-1]}; choice and uniform is given",
        ),
        (
            "num_trials: 2\nspace:\n  outer.lr: {uniform: [1, 0.5]}\n",
            "s.yaml:6: space: uniform is [1.0, 0.5]; the first must be below the second",
        ),
        (
            "num_trials: 2\nspace:\n  inner.num_steps: {integer: [1.5, 2]}\n",
            "s.yaml:6: space.inner.num_steps.integer.0 is 1.5; it should be a valid integer",
        ),
        (
            "num_trials: 2\nspace:\n  outer.lr: {gauss: [0, 1]}\n",
            "s.yaml:6: space.outer.lr.gauss is unknown; allowed here: choice, grid, integer,",
        ),
        (
            "num_trials: 2\nspace: {seed: {choice: [1, 2]}}\n",
            "space: seed cannot differ between trials, which are compared on the same episodes at"
            " the same steps; give it under `set`",
        ),
        (
            "num_trials: 2\nspace: {episodes.train.num_shots: {choice: [1]}}\n",
            "space: episodes.train.num_shots cannot differ",
        ),
        (
            f"{TWELVE}scheduler: hyperband\n",
            "s.yaml:6: scheduler.kind is 'hyperband'; it should be one of 'asha', 'none'",
        ),
        (
            f"{TWELVE}search: optuna\nspace: {{inner.lr: {{grid: [1]}}}}\n".replace(LR, ""),
            "s.yaml: space: optuna searches no grid; use choice, or search: random",
        ),
        *(
            (
                f"{TWELVE}scheduler: {text}\n",
                "s.yaml:6: scheduler is pbt: raymaml has no population-based training any more;"
                " use asha or none",
            )
            for text in ("pbt", "{kind: pbt, perturb_every: 5, quantile: 0.25}")
        ),
        *(
            (f"{LR}num_trials: {count}\n", "these are more than 10,000 trials; give fewer")
            for count in (10_001, 2**62)
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    text = "num_trials: no\nspaec: 1\nspace: {outer.lr: {uniform: [2, 1]}}\n"
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert len(caught.value.problems) == 3
