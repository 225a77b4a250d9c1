"""`model.norm`: a policy, a policy with options, or either by name pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import dump_config, load_config
from raymaml.config.model import ModelConfig
from raymaml.training.identity import flat

CONFIG = Path(__file__).resolve().parents[2] / "configs/omniglot/5way-1shot.yaml"


@pytest.mark.parametrize(
    ("norm", "text", "transductive"),
    [
        ("context", "context", False),
        ({"policy": "context", "per_step": "none"}, "context", False),
        ({"policy": "running", "per_step": "both"}, "running per_step=both", False),
        (
            {"policy": "transductive", "scale": False},
            "transductive scale=false",
            True,
        ),
        (
            {"*.conv1": "none", "*": {"policy": "transductive", "per_step": "affine"}},
            "*.conv1: none, *: transductive per_step=affine",
            True,
        ),
    ],
)
def test_a_norm_has_a_text_and_survives_dump_and_load(
    tmp_path: Path, norm: Any, text: str, transductive: bool
) -> None:
    model = ModelConfig(norm=norm)
    assert (model.norm_text, model.is_transductive) == (text, transductive)
    config = load_config(CONFIG, [f"model.norm={norm}"])
    assert config.model.norm == model.norm
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config
    assert flat(config.learning)["model.norm"] == config.model.model_dump(mode="json")["norm"]


def test_a_policy_without_options_is_the_policy_however_it_is_written() -> None:
    alone = ModelConfig(norm="context")
    assert ModelConfig(norm={"policy": "context", "scale": True}) == alone
    assert ModelConfig(norm={"*": {"policy": "context"}}) == ModelConfig(norm={"*": "context"})


@pytest.mark.parametrize(
    ("norm", "problem"),
    [
        (
            "{policy: context, per_step: both}",
            "model.norm.per_step is both but model.norm.policy is context: only running keeps"
            " moments from episode to episode; affine gives each step a scale and shift",
        ),
        (
            "{policy: none, per_step: affine}",
            "model.norm.per_step is affine but model.norm.policy is none: none has neither scale",
        ),
        (
            "{policy: none, scale: false}",
            "model.norm.scale is false but model.norm.policy is none: it has none",
        ),
        ("{per_step: affine}", "model.norm.policy is missing"),
        ("{policy: contxt}", "model.norm.policy is 'contxt'; it should be 'transductive'"),
        ("{policy: context, per_stp: affine}", "per_stp is unknown; did you mean per_step?"),
        ('{"*": {policy: context, per_step: afine}}', "model.norm.*.per_step is 'afine'; it"),
        ('{"*": contxt}', "model.norm.* is 'contxt'; it should be 'transductive'"),
        ("contxt", "model.norm is 'contxt'; it should be 'transductive'"),
        ("{}", "model.norm is {}; it should have at least 1 item"),
    ],
)
def test_what_is_wrong_with_a_norm_is_one_message(norm: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(CONFIG, [f"model.norm={norm}"])
    (found,) = caught.value.problems
    assert found.startswith("command line: ")
    assert problem in found
