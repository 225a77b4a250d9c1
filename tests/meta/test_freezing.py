"""What adapts: anchored patterns, the table, and errors."""

from __future__ import annotations

import pytest
import torch
from helpers_meta import build, episodes

from raymaml.common.errors import UserError
from raymaml.common.patterns import matches
from raymaml.meta.freezing import frozen_names


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("encoder.conv1", "encoder.conv1.norm.bias", True),
        ("encoder.conv1", "encoder.conv10.weight", False),
        ("conv1", "encoder.conv1.conv.weight", False),
        ("*.norm", "encoder.layer1.conv2.norm.weight", True),
        ("*.norm", "encoder.norms.weight", False),
        ("head", "head.bias", True),
        ("head.bias", "head.weight", False),
        ("encoder.layer[12]", "encoder.layer2.conv1.conv.weight", True),
        ("encoder.layer[12]", "encoder.layer3.conv1.conv.weight", False),
        ("*", "anything", True),
    ],
)
def test_patterns_are_anchored_and_stand_for_all_inside(
    pattern: str, name: str, fits: bool
) -> None:
    assert matches(pattern, name) is fits


def test_what_is_frozen_stays_but_gets_a_meta_gradient() -> None:
    learner, episode = build("convnet4", "context", "learned", frozen=("*.norm",)), episodes()[0]
    start, *_, fast = learner.adapt(episode)
    for name in learner.params:
        moved = not torch.equal(start.params[name], fast.params[name])
        assert moved is (".norm." not in name and name != "temperature")
    grads = learner.episode_gradient(episode).grads
    assert all(grad.any() for grad in grads.values())


def test_test_may_freeze_something_else() -> None:
    learner = build("convnet4", "layer", "learned")
    other = type(learner)(
        learner.model,
        learner.inner,
        test_inner=learner.inner.model_copy(update={"frozen": ("encoder",)}),
    )
    start, *_, fast = other.adapt(episodes()[0])
    moved = {n for n in start.params if not torch.equal(start.params[n], fast.params[n])}
    assert moved == {"head.weight", "head.bias"}


def test_all_patterns_without_a_match_are_named() -> None:
    names = ["encoder.conv1.weight", "head.bias"]
    with pytest.raises(UserError) as caught:
        frozen_names("inner.frozen", names, ("bn", "head", "encoder.conv2"))
    assert [problem.partition(" matches")[0] for problem in caught.value.problems] == [
        "inner.frozen: 'bn'",
        "inner.frozen: 'encoder.conv2'",
    ]
    assert "it has encoder.conv1, head" in str(caught.value)


def test_nothing_to_adapt_is_like_no_inner_step() -> None:
    still = build("convnet4", "layer", "learned", frozen=("*",))
    none = build("convnet4", "layer", "learned", num_steps=0)
    batch = episodes(2)
    assert torch.equal(still.predict(batch), none.predict(batch))
    for gradient in ("unrolled", "checkpointed", "first_order"):
        still = build("convnet4", "layer", "learned", frozen=("*",), gradient=gradient)
        for one, two in zip(
            still.meta_gradient(batch)[2].values(),
            none.meta_gradient(batch)[2].values(),
            strict=True,
        ):
            torch.testing.assert_close(one, two)


def test_the_table_says_what_adapts_with_how_many_parameters() -> None:
    table = build("convnet4", "context", "learned", frozen=("*.norm",)).adaptation_table()
    rows = [line.split() for line in table.splitlines()]
    assert ["encoder.conv1.conv", "20", "adapts"] in rows  # 2 x 1 x 3 x 3 + 2
    assert ["encoder.conv1.norm", "4", "frozen"] in rows
    assert ["temperature", "1", "frozen"] in rows
    # 20 + 3 x 38 convolutions, 16 of norms, head 3 x 2 + 3, temperature
    assert rows[-1] == ["in", "all", "160", "143", "adapt"]
