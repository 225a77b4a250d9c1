"""Outer updates by hand: Adam, SGD with momentum, clipping by value, the cosine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymaml.config.model import OuterConfig
from raymaml.training.optimizer import build_optimizer, learning_rate, update


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


BY_HAND = {
    "sgd goes down the gradient": ({"optimizer": "sgd"}, [[1.0, -2.0]], [0.5, 2.0]),
    # v1 = 1, v2 = 0.9 * 1 + 1 = 1.9: 0.5 - 0.5 * 1.9 = -0.45
    "momentum adds to the velocity": (
        {"optimizer": "sgd", "momentum": 0.9},
        [[1.0, 0.0], [1.0, 0.0]],
        [-0.45, 1.0],
    ),
    # g = 1, then 2: m = (0.9 * 0.1 + 0.1 * 2) / (1 - 0.81) = 0.29 / 0.19 = 1.526316,
    # v = (0.999 * 0.001 + 0.001 * 4) / (1 - 0.998001) = 0.004999 / 0.001999 = 2.500750,
    # 0.5 - 0.5 * 1.526316 / sqrt(2.500750) = 0.5 - 0.482591 = 0.017409
    "adam": ({}, [[1.0, 1.0], [2.0, 2.0]], [0.017409, 0.017409]),
    # 1 - 0.5 * (2 + 0.1 * 1) = -0.05
    "decay is added to the gradient": (
        {"optimizer": "sgd", "weight_decay": 0.1},
        [[2.0, 0.0]],
        [-0.05, 0.95],
    ),
    # decay first, 1 - 0.5 * 0.1 * 1 = 0.95; then the first step of Adam, the rate
    "adamw decays apart from the gradient": (
        {"optimizer": "adamw", "weight_decay": 0.1},
        [[100.0, 1.0]],
        [0.45, 0.45],
    ),
    # v = 0.01 * g^2: the first step is 0.5 * g / (0.1 * |g|) = 5; the second, with momentum 0.9,
    # v = 0.99 * 0.01 + 0.01 = 0.0199: 0.9 * 10 + 1 / 0.141067 = 16.088763 times 0.5
    "rmsprop": (
        {"optimizer": "rmsprop", "momentum": 0.9},
        [[1.0, -1.0], [1.0, -1.0]],
        [1 - 5 - 8.0443815, 1 + 5 + 8.0443815],
    ),
    "each entry is clipped": (
        {"optimizer": "sgd", "clip_value": 0.25},
        [[-5.0, 0.125]],
        [1.125, 0.9375],
    ),
    # (30, 4) -> entries at most 3 -> (3, 3) -> length 1: 3 / sqrt(18) = 0.707107
    "then the whole gradient is scaled down": (
        {"optimizer": "sgd", "lr": 1.0, "clip_value": 3.0, "clip_norm": 1.0},
        [[30.0, 4.0]],
        [1 - 0.707107, 1 - 0.707107],
    ),
    "unless it is short enough": (
        {"optimizer": "sgd", "lr": 1.0, "clip_value": 3.0, "clip_norm": 1.0},
        [[0.25, 0.5]],
        [0.75, 0.5],
    ),
}


@pytest.mark.parametrize(("keys", "gradients", "place"), BY_HAND.values(), ids=BY_HAND)
def test_updates_by_hand(
    keys: dict[str, Any], gradients: list[list[float]], place: list[float]
) -> None:
    assert after(outer(**keys), *gradients)[-1] == pytest.approx(place, rel=1e-4, abs=2e-6)


def test_the_cosine_falls_from_the_rate_to_zero() -> None:
    config = outer(schedule="cosine")
    rates = [learning_rate(config, step) for step in (0, 5, 10)]
    # 0.5 * (1 + cos(pi * 2.5 / 10)) / 2 at a quarter is 0.5 * 0.853553
    assert rates == pytest.approx([0.5, 0.25, 0.0])
    quarter = learning_rate(outer(schedule="cosine", num_steps=4), 1)
    assert quarter == pytest.approx(0.5 * 0.853553, rel=1e-5)
    assert [learning_rate(outer(), step) for step in (0, 5, 10)] == [0.5, 0.5, 0.5]


def test_the_cosine_ends_at_the_final_rate() -> None:
    # halfway between 0.5 and 0.1 is 0.3; PyTorch's schedule of the same ends
    rates = [learning_rate(outer(schedule="cosine", final_lr=0.1), step) for step in range(11)]
    assert (rates[0], rates[5], rates[10]) == pytest.approx((0.5, 0.3, 0.1))
    optimizer = build_optimizer(outer(), {"w": torch.ones(2, requires_grad=True)})
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for rate in rates:
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_an_update_uses_the_rate_of_its_step() -> None:
    config = outer(optimizer="sgd", schedule="cosine")
    ((middle, _),) = after(config, [1.0, 0.0], first_step=5)
    assert middle == pytest.approx(1 - 0.25)


def test_the_rate_falls_at_each_milestone() -> None:
    config = outer(schedule="step", milestones=[3, 5], gamma=0.5)
    rates = [learning_rate(config, step) for step in range(7)]
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(("schedule", "full"), [("constant", 0.5), ("cosine", None)])
def test_the_rate_rises_in_equal_parts_at_first(schedule: str, full: float | None) -> None:
    warm, cold = (outer(schedule=schedule, warmup_steps=steps) for steps in (4, 0))
    for step, part in enumerate([0.25, 0.5, 0.75, 1.0, 1.0]):
        assert learning_rate(warm, step) == pytest.approx(part * learning_rate(cold, step))
    assert full is None or learning_rate(warm, 9) == full


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"momentum": 0.9}, "momentum belongs to sgd and rmsprop"),
        ({"schedule": "step"}, "step needs milestones"),
        ({"milestones": [3]}, "nothing else has them"),
        ({"gamma": 0.5}, "gamma belongs to step"),
        ({"schedule": "step", "milestones": [5, 3]}, "it must ascend"),
        ({"final_lr": 0.1}, "final_lr belongs to cosine"),
        ({"schedule": "cosine", "final_lr": 0.6}, "it must be at most outer.lr, 0.5"),
        ({"warmup_steps": 10}, "must be below outer.num_steps, 10"),
    ],
)
def test_options_without_effect_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        outer(**keys)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
def test_every_optimizer_goes_on_from_its_state(optimizer: str) -> None:
    keys = {"momentum": 0.5} if optimizer in {"sgd", "rmsprop"} else {}
    config = outer(optimizer=optimizer, weight_decay=0.01, schedule="cosine", **keys)
    gradients = [[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]]
    whole = after(config, *gradients)[-1]
    params = {"w": torch.ones(2, requires_grad=True)}
    state = build_optimizer(config, params).state_dict()
    for step, gradient in enumerate(gradients):
        again = build_optimizer(config, params)
        again.load_state_dict(state)
        update(again, config, params, {"w": torch.tensor(gradient)}, step)
        state = again.state_dict()
    assert params["w"].tolist() == whole
