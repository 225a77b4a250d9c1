"""The inner loop: adaptation of the parameters to one support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.meta import rules
from raymaml.types import Buffers, Params

SupportLoss = Callable[[Params, Buffers], tuple[Tensor, Buffers]]
"""(weights, moments) -> scalar loss on the support set, and the moments after the pass."""


@dataclass(frozen=True, kw_only=True)
class Fast:
    """The state that the inner loop carries from step to step."""

    params: Params
    """The adapted parameters, theta'."""
    velocity: Params
    """Velocities of the momentum, by the same names; empty without momentum."""
    buffers: Buffers
    """Moments that norm layers accumulate; never differentiated through."""
    rates: Mapping[str, float]
    """The inner rate of each parameter, which no step changes."""

    def detached(self) -> Fast:
        """Return fresh leaves of the same values."""
        return replace(self, params=leaves(self.params), velocity=leaves(self.velocity))


def unroll(
    support_loss: SupportLoss, start: Fast, inner: InnerConfig, *, create_graph: bool
) -> Iterator[Fast]:
    """Yield the fast weights before the first inner step, then after each step (T + 1 in all).

    Finn et al. 2017, algorithm 1, lines 5 and 6; the only inner loop of the package, for training
    and evaluation alike.

    Args:
        support_loss: the loss that each step descends.
        start: where adaptation starts.
        inner: number of steps, momentum and weight decay.
        create_graph: keep the weights differentiable in ``start`` (second order). Without it the
            weights are fresh leaves after each step, and the graph of a step is freed after use.
    """
    fast = start if create_graph else start.detached()
    yield fast
    for _ in range(inner.num_steps):
        fast = step(support_loss, fast, inner, create_graph=create_graph)
        if not create_graph:
            fast = fast.detached()
        yield fast


def step(support_loss: SupportLoss, fast: Fast, inner: InnerConfig, *, create_graph: bool) -> Fast:
    """Take one inner step."""
    loss, buffers = support_loss(fast.params, fast.buffers)
    if not fast.params:  # all is frozen, and autograd refuses to have nothing to do
        return replace(fast, buffers=buffers)
    found = torch.autograd.grad(
        loss, list(fast.params.values()), create_graph=create_graph, allow_unused=True
    )
    grads = dict(zip(fast.params, found, strict=True))
    params, velocity = rules.sgd(fast.params, fast.velocity, grads, fast.rates, inner)
    return replace(fast, params=params, velocity=velocity, buffers=buffers)


def leaves(params: Params) -> Params:
    """Return the same values as leaves: detached, and differentiable."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}
