"""Contracts 2 and 3 without Ray for the family: what a rule learns is as exact as the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import CPU, Killed, result, run, run_with_workers

from raymaml.config.schema import Config
from raymaml.training.checkpoint import find_checkpoint, saved_step, weights_of
from raymaml.training.state import build_state

MEMBERS = {
    "Meta-SGD": (
        "inner.rates=per_parameter",
        "inner.lr_range=[0.05, 0.2]",
        "outer.rule_lr=0.01",
    ),
    "MAML++": (
        "model.norm={policy: running, per_step: both}",
        "inner.rates=per_tensor_per_step",
        "inner.multi_step_loss={num_outer_steps: 4, num_stages: 2}",
        "inner.first_order_steps=2",
        "outer.schedule=cosine",
        "outer.final_lr=1e-5",
        "outer.keep_best=3",
    ),
    "Adam inside": (  # with all that is drawn
        "inner.rule=adam",
        "inner.lr=0.01",
        "inner.rates=shared",
        "inner.learned=[beta1, epsilon]",
        "inner.support_batch_size=2",
        "inner.gradient=mixed_mode",
        "inner.clip_between=1.0",
    ),
    "implicit": (
        "inner.gradient=implicit",
        "inner.lr=0.02",
        "inner.proximal=20",
        "inner.frozen=[encoder.conv1]",
        "model.head=zero",
    ),
    "ALFA on prototypes": ("inner.rule=alfa", "model.head=prototypes"),
}
LEARNED = {"Meta-SGD": 18, "MAML++": 18, "Adam inside": 3, "implicit": 0, "ALFA on prototypes": 22}
"""Numbers of tensors of a rule. 9 layers adapt, each with weight and bias; ALFA's network has 4."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs that nothing happens to, with their shards."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(params=MEMBERS)
def undisturbed(request: Any, make_config: Any, whole: Path) -> tuple[str, Config]:
    """A member, and its config with a finished run."""
    config: Config = make_config(whole / request.param.replace(" ", "-"), *MEMBERS[request.param])
    if not config.run_folder.exists():
        run(config)
    return request.param, config


@pytest.mark.parametrize("way", ["2 workers", "3 workers", "killed"])
def test_workers_and_a_kill_end_in_the_same_bits(
    undisturbed: tuple[str, Config], tmp_path: Path, way: str
) -> None:
    config = undisturbed[1]
    fresh = config.model_copy(update={"run_dir": tmp_path / "runs"})
    if way == "killed":
        with pytest.raises(Killed):
            run(fresh, die_before=5)
        assert saved_step(fresh.run_folder) == 3
        run(fresh)
    else:
        run_with_workers(fresh, int(way[0]))
    assert result(fresh.run_folder) == result(config.run_folder)


def test_what_the_rule_learns_moves_and_is_kept(undisturbed: tuple[str, Config]) -> None:
    member, config = undisturbed
    kept = weights_of(find_checkpoint(config.run_folder, "last"), CPU)
    state = build_state(config, (1, 16, 16), CPU)  # before the first step
    rule = {name: value for name, value in state.params.items() if name.startswith("rule.")}
    assert len(rule) == LEARNED[member]
    moved = [name for name, value in rule.items() if not torch.equal(value, kept[name])]
    # a bias in front of a batch norm has no gradient but rounding
    assert len(moved) >= 0.5 * len(rule)
    assert all(value.isfinite().all() for value in kept.values())
