"""The outer loop's update rule and its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from raymaml.config.model import OuterConfig, OuterSteps
from raymaml.types import Params


def build_optimizer(outer: OuterSteps, params: Params) -> torch.optim.Optimizer:
    """Return the optimizer of the meta-parameters."""
    of_rule = [value for name, value in params.items() if name.startswith("rule.")]
    theta = [value for name, value in params.items() if not name.startswith("rule.")]
    values: Any = theta  # rates do not decay
    if of_rule:
        values = [{"params": theta}, {"params": of_rule, "weight_decay": 0.0}]
    lr, decay = outer.lr, outer.weight_decay
    match outer.optimizer:
        case "adam":
            return torch.optim.Adam(values, lr=lr, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(values, lr=lr, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(values, lr=lr, weight_decay=decay, momentum=outer.momentum)
        case "sgd":
            return torch.optim.SGD(values, lr=lr, weight_decay=decay, momentum=outer.momentum)


def learning_rate(outer: OuterSteps, step: int) -> float:
    """Return the rate of outer step ``step``: a function of the step, so that resuming is exact."""
    warm = min(1.0, (step + 1) / outer.warmup_steps) if outer.warmup_steps else 1.0
    return outer.lr * warm * _scheduled(outer, step)


def _scheduled(outer: OuterSteps, step: int) -> float:
    """Return the share of the full rate that the schedule leaves."""
    if outer.schedule == "cosine":
        end = outer.final_lr / outer.lr
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / outer.num_steps))
    # without milestones, as for constant, this is 1
    return outer.gamma ** sum(step >= milestone for milestone in outer.milestones)


def update(
    optimizer: torch.optim.Optimizer, outer: OuterSteps, params: Params, grads: Params, step: int
) -> None:
    """Move the meta-parameters down ``grads`` (algorithm 1, line 8), in place.

    Clipped first entry by entry, then as a whole.
    """
    for name, parameter in params.items():
        parameter.grad = grads[name]
    if outer.clip_value is not None:
        torch.nn.utils.clip_grad_value_(params.values(), outer.clip_value)
    if outer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(params.values(), outer.clip_norm)
    lr = learning_rate(outer, step)
    theta, *of_rule = optimizer.param_groups
    theta["lr"] = lr
    for group in of_rule:
        group["lr"] = lr * outer.rule_rate if isinstance(outer, OuterConfig) else lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
