"""Derivatives of passes: what methods without a graph ask for, and derivatives scaled down."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from raymaml.types import Buffers, Fast, Params, QueryLoss, SupportLoss

Product = Callable[[Params], Params]
"""A direction in the parameters that adapt, by name, zero where it has none -> the derivative along
it of the gradient of the support loss in adapting and frozen parameters, where there is one."""


@dataclass(frozen=True)
class SupportGradient:
    """The gradient of the support loss at some weights."""

    grads: Params
    """In the parameters that adapt, where the loss depends on them."""
    buffers: Buffers
    """Moments after the pass."""
    product: Product
    """Its derivatives there, which may hold activations of the pass."""


class Derivatives(Protocol):
    """The derivatives of an episode's losses at some weights, without a graph on these."""

    def support(self, fast: Fast) -> SupportGradient:
        """Return the gradient of the support loss."""

    def products(self, fast: Fast) -> Product:
        """Return the derivatives of that gradient alone."""

    def query(self, fast: Fast, weight: float) -> tuple[Tensor, Tensor, Params]:
        """Return the query loss times a weight, the logits, and the gradient of that product in
        all parameters, zero where there is none."""


@dataclass(frozen=True)
class ByAutograd:
    """The derivatives of any model, which PyTorch computes.

    ``frozen`` are parameters that the losses depend on beside those that adapt.
    """

    support_loss: SupportLoss
    query_loss: QueryLoss
    frozen: Params

    def support(self, fast: Fast) -> SupportGradient:
        """See ``Derivatives``."""
        grads, buffers = differentiated_support(self.support_loss, fast, create_graph=False)
        return SupportGradient(grads, buffers, self.products(fast))

    def products(self, fast: Fast) -> Product:
        """See ``Derivatives``."""
        return partial(gradient_along, self.support_loss, fast, self.frozen)

    def query(self, fast: Fast, weight: float) -> tuple[Tensor, Tensor, Params]:
        """See ``Derivatives``."""
        loss, logits = self.query_loss(fast)
        loss = weight * loss
        grads = differentiated(loss, self.frozen | fast.params)
        return loss.detach(), logits.detach(), grads


def differentiated_support(
    support: SupportLoss, fast: Fast, *, create_graph: bool
) -> tuple[Params, Buffers]:
    """Return the gradient of the support loss, where there is one, and moments after the pass."""
    loss, buffers = support(fast)
    values = list(fast.params.values())
    if not values:  # all is frozen, and autograd refuses to have nothing to do
        return {}, buffers
    found = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
    named = zip(fast.params, found, strict=True)
    return {name: grad for name, grad in named if grad is not None}, buffers


def differentiated(loss: Tensor, inputs: Params) -> Params:
    """Return the gradient of ``loss`` by name, zero where it does not depend."""
    values = list(inputs.values())
    found = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


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
    make_forward_mode_ready()
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
