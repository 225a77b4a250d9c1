"""Encoders, norms and heads: sizes, weights by seed, and nothing kept between batches."""

from __future__ import annotations

import pytest
import torch

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.models import build_model
from raymaml.models.heads import Classifier


def build(size: int = 16, channels: int = 1, width: int = 4, seed: int = 0) -> Classifier:
    return build_model(
        ModelConfig(width=width), image_shape=(channels, size, size), num_ways=5, seed=seed
    )


def test_convnet4_64_for_omniglot_has_the_papers_112261_parameters() -> None:
    # conv 9*64 + 64, three of 9*64*64 + 64, four norms of 2*64, head 64*5 + 5
    total = sum(parameter.numel() for parameter in build(28, 1, 64).parameters())
    assert total == 640 + 3 * 36_928 + 4 * 128 + 325 == 112_261


@pytest.mark.parametrize(("size", "features"), [(16, 4), (28, 4), (32, 16), (84, 100), (31, 4)])
def test_four_poolings_halve_the_image_four_times(size: int, features: int) -> None:
    model = build(size, channels=3)  # width 4 x (size // 16)^2
    assert model.encoder(torch.zeros(2, 3, size, size)).shape == (2, features)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_an_image_too_small_for_the_encoder_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.image_size is 15, .* use at least 16"):
        build(15)


def test_weights_depend_on_the_seed_alone() -> None:
    one = build(seed=7).state_dict()
    torch.manual_seed(99)
    torch.randn(3)
    again, other = build(seed=7).state_dict(), build(seed=8).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["encoder.conv1.conv.weight"], other["encoder.conv1.conv.weight"])


def test_the_head_starts_small_and_biases_at_zero() -> None:
    weights = build(84, width=32).state_dict()
    # 5 x 800 draws of std 0.01: the sample deviation is within 5%
    assert weights["head.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    biases = [value for name, value in weights.items() if name.endswith("bias")]
    assert len(biases) == 9
    assert all(not value.any() for value in biases)


def test_nothing_is_accumulated() -> None:
    model, x = build(), torch.rand(4, 1, 16, 16)
    before = model(x)
    model(torch.rand(4, 1, 16, 16) * 100)
    assert torch.equal(model(x), before)
    assert torch.equal(model.eval()(x), before)  # train() and eval() are the same
    assert list(model.buffers()) == []
