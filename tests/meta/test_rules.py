"""The parameters that adapt: anchored patterns, the table, and errors."""

from __future__ import annotations

import pytest
import torch
from helpers_meta import build, episodes

from raymaml import MetaLearner
from raymaml.common.errors import UserError
from raymaml.common.patterns import matches


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("encoder.conv1", "encoder.conv1.norm.bias", True),
        ("encoder.conv1", "encoder.conv10.weight", False),
        ("conv1", "encoder.conv1.conv.weight", False),
        ("*.norm", "encoder.layer1.conv2.norm.weight", True),
        ("*.norm", "encoder.norms.weight", False),
        ("head.bias", "head.weight", False),
        ("encoder.layer[12]", "encoder.layer2.conv1.conv.weight", True),
        ("encoder.layer[12]", "encoder.layer3.conv1.conv.weight", False),
        ("*", "anything", True),
    ],
)
def test_patterns_are_anchored_and_match_all_inside(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


def test_a_frozen_parameter_stays_but_gets_a_meta_gradient() -> None:
    learner, episode = build(norm="context", frozen=("*.norm",)), episodes()[0]
    start, *_, fast = learner.adapt(episode)
    for name in learner.params:
        moved = not torch.equal(start.params[name], fast.params[name])
        assert moved is (".norm." not in name and name != "temperature")
    assert all(grad.any() for grad in learner.episode_gradient(episode).grads.values())


def test_all_patterns_without_a_match_are_named() -> None:
    with pytest.raises(UserError) as caught:
        build(frozen=("bn", "head", "encoder.conv5"))
    assert [problem.partition(" matches")[0] for problem in caught.value.problems] == [
        "inner.frozen: 'bn'",
        "inner.frozen: 'encoder.conv5'",
    ]
    assert "it has encoder.conv1.conv, encoder.conv1.norm" in str(caught.value)


def test_nothing_to_adapt_is_like_no_inner_step() -> None:
    batch, none = episodes(2), build(norm="layer", num_steps=0)
    for gradient in ("unrolled", "checkpointed", "first_order"):
        still = build(norm="layer", frozen=("*",), gradient=gradient)
        torch.testing.assert_close(still.meta_gradient(batch)[2], none.meta_gradient(batch)[2])
        assert torch.equal(still.predict(batch), none.predict(batch))


def test_the_table_says_what_adapts_with_how_many_parameters() -> None:
    one = build(norm="context", frozen=("*.norm",))
    one.model.encoder.conv2.conv.requires_grad_(False)  # neither adapts nor learns
    learner = MetaLearner(one.model, one.inner)
    assert {"encoder.conv2.conv.weight", "encoder.conv2.conv.bias"}.isdisjoint(learner.params)
    rows = [line.split() for line in learner.adaptation_table().splitlines()]
    assert ["encoder.conv1.conv", "20", "adapts"] in rows  # 2 x 1 x 3 x 3 + 2
    assert ["encoder.conv2.conv", "38", "frozen"] in rows
    assert ["encoder.conv1.norm", "4", "frozen"] in rows
    assert ["temperature", "1", "frozen"] in rows
    # 20 + 3 x 38 convolutions, 16 of norms, head 3 x 2 + 3, temperature
    assert rows[-1] == ["in", "all", "160", "105", "adapt"]
