"""Update rules of the inner loop."""

from __future__ import annotations

from raymaml.config.schema import InnerConfig
from raymaml.types import Params

HEAD = "head."
"""Names under this prefix belong to the head, all others to the encoder."""


def learning_rate(name: str, inner: InnerConfig) -> float:
    """Return the inner rate of the parameter ``name``."""
    if name.startswith(HEAD) and inner.head_lr is not None:
        return inner.head_lr
    return inner.lr


def sgd(fast: Params, grads: Params, inner: InnerConfig) -> Params:
    """Take one step of gradient descent: a new dictionary, differentiable in both arguments."""
    return {
        name: weight - learning_rate(name, inner) * grads[name] for name, weight in fast.items()
    }
