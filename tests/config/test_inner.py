"""The section `inner`: each refusal says why, and every other combination is legal."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raymaml.config.inner import RULE_ARGS, InnerConfig
from raymaml.config.schema import Config
from raymaml.meta.rules import RULES

IMPLICIT = {"gradient": "implicit", "proximal": 1.0}
MULTI_STEP = {"num_outer_steps": 10}


def make(**sections: Any) -> Config:
    """The smallest config, with these sections."""
    tree: dict[str, Any] = {
        "name": "a",
        "data": {"source": {"kind": "glyphs"}, "bank": "bank", "shards": "shards"},
        "episodes": {split: {"num_episodes": 1} for split in ("train", "val", "test")},
        "outer": {"num_steps": 1},
    }
    return Config.model_validate(tree | sections)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rule": "adan"}, "inner.rule is 'adan'; it must be one of sgd, rmsprop, adam, alfa, or"),
    ({"rule": "adan"}, "did you mean adam?"),
    ({"rule": "my.rules"}, "package.module:Name"),
    (
        {"rule_args": {"beta": 0.9}},
        "rule_args: sgd has none; its number is inner.momentum; remove beta",
    ),
    ({"rule": "adam", "rule_args": {"beta": 0.9}}, "adam has beta1, beta2, epsilon; remove beta"),
    ({"rule": "rmsprop", "learned": ["lr"]}, "learned: rmsprop has beta, epsilon, and not lr"),
    ({"rule": "rmsprop", "momentum": 0.9}, "inner.momentum is 0.9 but inner.rule is rmsprop"),
    (
        {"rule": "rmsprop", "rule_args": {"beta": 1.0}},
        "args.beta is 1.0; it must be from 0 to below 1",
    ),
    ({"rule": "adam", "rule_args": {"beta2": -0.1}}, "beta2 is -0.1; it must be from 0 to"),
    ({"rule": "adam", "rule_args": {"epsilon": 0}}, "rule_args.epsilon is 0.0; it must be above 0"),
    ({"lr_range": [0.1, 0.2]}, "is [0.1, 0.2] but inner.rates is fixed: it is for learned rates"),
    ({"rates": "shared", "lr_range": [0.2, 0.1]}, "is [0.2, 0.1]; it must ascend"),
    (
        {"gradient": "reptile", "rates": "shared"},
        "reptile, which looks at the adapted weights",
    ),
    ({**IMPLICIT, "learned": ["momentum"]}, "no rate or number of the rule can be learned"),
    ({"gradient": "reptile", "rule": "alfa"}, "no rate or number of the rule can be learned"),
    ({**IMPLICIT, "multi_step_loss": MULTI_STEP}, "multi_step_loss needs a method that follows"),
    ({"gradient": "reptile", "clip_between": 1.0}, "inner.clip_between has nothing to clip"),
    ({**IMPLICIT, "first_order_steps": 1}, "inner.first_order_steps must be 0"),
    ({"gradient": "implicit"}, "implicit, which needs inner.proximal: set it, such as 10.0"),
    ({"proximal": 1.0}, "is 1.0 but inner.gradient is auto: it belongs to implicit"),
    ({"cg_steps": 9}, "inner.cg_steps is 9 but inner.gradient is auto: it belongs to implicit"),
    ({"gradient": "reptile", "lr": 0}, "inner.lr must be above 0, since the meta-gradient is"),
    ({"gradient": "reptile", "num_steps": 0}, "the adapted weights, but inner.num_steps is 0"),
    (
        {"gradient": "unrolled", "keep_every": 2},
        "keep_every is 2 but inner.gradient is unrolled: it",
    ),
    ({"multi_step_loss": {"num_outer_steps": 4}}, "num_stages is 10; it must be at most"),
    ({"support_batch_size": 0}, "support_batch_size"),
]


@pytest.mark.parametrize(("keys", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_does_not_fit_says_why(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as error:
        InnerConfig(**keys)
    assert says in str(error.value)


def test_all_problems_of_a_kind_are_said_at_once() -> None:
    with pytest.raises(ValidationError) as error:
        InnerConfig(rule="adam", momentum=0.5, rule_args={"epsilon": 0, "beta1": 1})
    for problem in ("momentum belongs to sgd", "epsilon is 0.0; it must be above 0", "below 1"):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"inner": {"support_batch_size": 6}},  # 5 ways, 1 shot
            "inner.support_batch_size is 6, but a support set of episodes.train has 5 images",
        ),
        (
            {"inner": {"rule": "adam"}, "evaluation": {"inner": {"momentum": 0.5}}},
            "evaluation.inner.momentum is 0.5 but inner.rule is adam: momentum belongs to sgd",
        ),
        (
            {"inner": {"rates": "shared"}, "evaluation": {"inner": {"lr": 0.1}}},
            "inner.rates is shared, and evaluation takes the learned rates; leave them out",
        ),
        (
            {"inner": {"rates": "per_tensor"}, "evaluation": {"inner": {"head_lr": 0.1}}},
            "inner.rates is per_tensor, and evaluation takes the learned rates; leave them out",
        ),
    ],
)
def test_an_inner_loop_fits_episodes_and_evaluation(sections: Any, says: str) -> None:
    with pytest.raises(ValidationError) as error:
        make(**sections)
    assert says in str(error.value)


LEGAL: list[dict[str, Any]] = [
    {"rule": "my_package.rules:Rule", "rule_args": {"beta": 2, "size": 3}, "learned": ["other"]},
    {"learned": ["momentum"], "rates": "per_parameter", "lr_range": [0.001, 0.1]},
    {"rule": "alfa", "rule_args": {"decay": 0}, "gradient": "first_order"},
    {**IMPLICIT, "frozen": ["head"], "support_batch_size": 5, "weight_decay": 0.1},
    {"gradient": "reptile", "rule": "adam", "momentum": 0},
    {"keep_every": 7, "gradient": "auto", "clip_between": 1.0, "first_order_steps": 9},
    {"rates": "per_tensor_per_step", "num_steps": 0, "multi_step_loss": {"num_outer_steps": 10}},
    {"gradient": "first_order", "multi_step_loss": MULTI_STEP, "first_order_steps": 5},
]


@pytest.mark.parametrize("keys", LEGAL)
def test_the_rest_is_legal(keys: dict[str, Any]) -> None:
    InnerConfig(**keys)
    make(inner=keys, evaluation={"inner": {"num_steps": 10, "weight_decay": 0.2}})


def test_the_config_names_the_numbers_of_each_rule() -> None:
    numbers = {name: tuple(rule.numbers) for name, rule in RULES.items()}
    assert numbers.pop("sgd") == ("momentum",)  # which has a key of its own, inner.momentum
    assert numbers | {"sgd": ()} == RULE_ARGS


def test_a_rate_for_a_rule_that_learns_nothing_is_refused() -> None:
    outer = {"num_steps": 1, "rule_lr": 0.01}
    with pytest.raises(ValidationError, match=r"rule_lr is 0\.01 but the rule learns nothing"):
        make(outer=outer)
    for inner in ({"rates": "shared"}, {"learned": ["momentum"]}, {"rule": "alfa"}):
        assert make(outer=outer, inner=inner).outer.rule_rate == pytest.approx(10)
    assert make(outer=outer, inner={"rule": "my_rules:Own"}).outer.rule_lr == 0.01
