"""Derivatives of passes: a gradient along a direction, and derivatives that are scaled down."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from raymaml.types import Fast, Params, SupportLoss


def gradient_along(support: SupportLoss, fast: Fast, frozen: Params, direction: Params) -> Params:
    """Differentiate the gradient of the support loss along a direction, where there is one.

    Args:
        support: the loss.
        fast: the point.
        frozen: parameters that the loss depends on beside.
        direction: by name; zero for parameters that it does not name.

    Returns:
        By name, of adapting and frozen parameters.
    """
    with forward_ad.dual_level():
        params = {
            name: forward_ad.make_dual(value, direction[name]) if name in direction else value
            for name, value in fast.params.items()
        }
        loss, _ = support(replace(fast, params=params))
        inputs = params | frozen
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if tangent is None else tangent
            for (name, value), grad in zip(inputs.items(), grads, strict=True)
            if grad is not None
            for tangent in [forward_ad.unpack_dual(grad).tangent]
        }


@cache
def make_forward_mode_ready() -> None:
    """Let PyTorch load its rules, which warns of a function that it deprecates itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


class ClippedBack(torch.autograd.Function):
    """Returns tensors as they are, and scales their derivatives down to a Euclidean norm."""

    @staticmethod
    def forward(ctx: Any, limit: float, several: bool, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the values."""
        ctx.limit, ctx.first = limit, int(several)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives, of each episode (axis E) by its own norm."""
        norm = inner_product(grads, grads, ctx.first).sqrt()
        scale = ctx.limit / norm.clamp(min=ctx.limit)
        return None, None, *(grad * spread(scale, grad) for grad in grads)


def inner_product(a: Iterable[Tensor], b: Iterable[Tensor], first: int) -> Tensor:
    """Return the inner product over the entries of all tensors: [], or [E] for ``first`` = 1."""
    products = [one * other for one, other in zip(a, b, strict=True)]
    return torch.stack([each.reshape(*each.shape[:first], -1).sum(-1) for each in products]).sum(0)


def spread(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers, [] or [E], in a shape that broadcasts over ``like``, [...] or [E, ...]."""
    return numbers.view(*numbers.shape, *[1] * (like.dim() - numbers.dim()))
