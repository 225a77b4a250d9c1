"""Update rules of the inner loop."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.types import Params

HEAD = "head."
"""Names under this prefix belong to the head, all others to the encoder."""


def learning_rate(name: str, inner: InnerConfig) -> float:
    """Return the inner rate of the parameter ``name``."""
    if name.startswith(HEAD) and inner.head_lr is not None:
        return inner.head_lr
    return inner.lr


def sgd(
    fast: Params, velocity: Params, grads: Mapping[str, Tensor | None], inner: InnerConfig
) -> tuple[Params, Params]:
    """Take one step of gradient descent with weight decay and momentum, as ``torch.optim.SGD``.

    Args:
        fast: weights before the step.
        velocity: by the same names, zero before the first step; empty without momentum.
        grads: None for a weight that the loss does not depend on, which stays as it is.
        inner: rates, momentum and weight decay.

    Returns:
        Weights and velocity after the step: new dictionaries, differentiable in all arguments.
    """
    new_fast, new_velocity = dict(fast), dict(velocity)
    for name, weight in fast.items():
        move = grads[name]
        if move is None:
            continue
        if inner.weight_decay:
            move = move + inner.weight_decay * weight
        if inner.momentum:
            move = new_velocity[name] = move + inner.momentum * velocity[name]
        new_fast[name] = weight - learning_rate(name, inner) * move
    return new_fast, new_velocity
