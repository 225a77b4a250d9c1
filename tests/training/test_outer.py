"""Outer updates by hand: Adam, SGD with momentum, clipping by value, the cosine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymaml.config.schema import OuterConfig
from raymaml.training.outer import build_optimizer, learning_rate, update


def outer(**keys: Any) -> OuterConfig:
    return OuterConfig(**{"num_steps": 10, "lr": 0.5, **keys})


def after(config: OuterConfig, *gradients: list[float], first_step: int = 0) -> list[list[float]]:
    """Where a parameter that starts at 1, 1 is after each update."""
    params = {"w": torch.ones(2, requires_grad=True)}
    optimizer = build_optimizer(config, params)
    places = []
    for step, gradient in enumerate(gradients, first_step):
        update(optimizer, config, params, {"w": torch.tensor(gradient)}, step)
        places.append(params["w"].tolist())
        assert params["w"].grad is None
    return places


def test_sgd_goes_down_the_gradient() -> None:
    assert after(outer(optimizer="sgd"), [1.0, -2.0]) == [[0.5, 2.0]]


def test_momentum_adds_to_the_velocity() -> None:
    # v1 = 1, v2 = 0.9 * 1 + 1 = 1.9: 1 - 0.5 * 1 = 0.5, 0.5 - 0.5 * 1.9 = -0.45
    first, second = after(outer(optimizer="sgd", momentum=0.9), [1.0, 0.0], [1.0, 0.0])
    assert first == [0.5, 1.0]
    assert second == pytest.approx([-0.45, 1.0])


def test_adams_first_step_is_the_rate_whatever_the_gradient() -> None:
    # m / sqrt(v) = g / |g|
    ((left, right),) = after(outer(), [1e-3, -100.0])
    assert (left, right) == pytest.approx((0.5, 1.5), rel=1e-4)


def test_adams_second_step_by_hand() -> None:
    # g = 1, then 2: m = (0.9 * 0.1 + 0.1 * 2) / (1 - 0.81) = 0.29 / 0.19 = 1.526316,
    # v = (0.999 * 0.001 + 0.001 * 4) / (1 - 0.998001) = 0.004999 / 0.001999 = 2.500750,
    # 0.5 - 0.5 * 1.526316 / sqrt(2.500750) = 0.5 - 0.482591 = 0.017409
    _, (second, _) = after(outer(), [1.0, 1.0], [2.0, 2.0])
    assert second == pytest.approx(0.017409, abs=2e-6)


def test_each_entry_of_the_gradient_is_clipped() -> None:
    config = outer(optimizer="sgd", clip_value=0.25)
    assert after(config, [-5.0, 0.125]) == [[1.125, 0.9375]]


def test_the_cosine_falls_from_the_rate_to_zero() -> None:
    config = outer(schedule="cosine")
    rates = [learning_rate(config, step) for step in (0, 5, 10)]
    # 0.5 * (1 + cos(pi * 2.5 / 10)) / 2 at a quarter is 0.5 * 0.853553
    assert rates == pytest.approx([0.5, 0.25, 0.0])
    quarter = learning_rate(outer(schedule="cosine", num_steps=4), 1)
    assert quarter == pytest.approx(0.5 * 0.853553, rel=1e-5)
    assert [learning_rate(outer(), step) for step in (0, 5, 10)] == [0.5, 0.5, 0.5]


def test_an_update_uses_the_rate_of_its_step() -> None:
    config = outer(optimizer="sgd", schedule="cosine")
    ((middle, _),) = after(config, [1.0, 0.0], first_step=5)
    assert middle == pytest.approx(1 - 0.25)
