"""The outer loop's update rule and its schedule."""

from __future__ import annotations

import math

import torch

from raymaml.config.schema import OuterConfig
from raymaml.types import Params


def build_optimizer(outer: OuterConfig, params: Params) -> torch.optim.Optimizer:
    """Return the optimizer of the meta-parameters."""
    if outer.optimizer == "adam":
        return torch.optim.Adam(params.values(), lr=outer.lr)
    return torch.optim.SGD(params.values(), lr=outer.lr, momentum=outer.momentum)


def learning_rate(outer: OuterConfig, step: int) -> float:
    """Return the rate of outer step ``step``: a function of the step, so that resuming is exact."""
    if outer.schedule == "constant":
        return outer.lr
    return outer.lr * 0.5 * (1 + math.cos(math.pi * step / outer.num_steps))


def update(
    optimizer: torch.optim.Optimizer, outer: OuterConfig, params: Params, grads: Params, step: int
) -> None:
    """Move the meta-parameters down ``grads`` (algorithm 1, line 8), in place."""
    for name, parameter in params.items():
        grad = grads[name]
        parameter.grad = (
            grad if outer.clip_value is None else grad.clamp(-outer.clip_value, outer.clip_value)
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(outer, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
