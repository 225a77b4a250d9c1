"""The exact meta-gradient by Hessian-vector products: ``inner.gradient: mixed_mode``.

An inner step with gradient ``g(theta) = d L / d theta``, L the support loss, is

    v[t+1] = momentum * v[t] + g(theta[t]) + decay * theta[t]
    theta[t+1] = theta[t] - lr * v[t+1]

Going backward with the derivatives of the query loss after a step, ``lam`` in theta[t+1] and ``nu``
in v[t+1], the chain rule gives those before it:

    u = nu - lr * lam                               the derivative in v[t+1], by both ways
    lam <- lam + decay * u + H(theta[t]) u          H the Hessian of L, which is symmetric
    nu <- momentum * u

and frozen parameters phi gather ``d (g u) / d phi``. Both products are the directional derivative
of one gradient, that of L in (theta, phi) at (theta[t], phi) along (u, 0): a forward derivative of
a reverse one. So there is no graph through the inner loop; memory holds the trajectory theta[0..T]
and the activations of one step (Pearlmutter 1994; Kemaev et al. 2025, arXiv 2505.00793).
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from raymaml.config.model import InnerConfig
from raymaml.meta.checkpointing import drawing_as, trajectory
from raymaml.meta.gradients import EpisodeGradient, EpisodeLosses, differentiate, outcome
from raymaml.meta.inner_loop import Fast, SupportLoss
from raymaml.meta.rules import learning_rate
from raymaml.types import Params


def mixed_mode(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Compute the exact second-order gradient with the memory of one inner step."""
    make_forward_mode_ready()
    states, fast = trajectory(losses.support, start, inner)
    loss, logits = losses.query(fast.params, fast.buffers)
    grads = differentiate([loss], frozen | fast.params)
    lam = {name: grads[name] for name in fast.params}
    total = {name: grads[name] for name in frozen}
    nu = {name: torch.zeros_like(value) for name, value in fast.velocity.items()}
    for state, generator in reversed(states):
        u = {name: -learning_rate(name, inner) * value for name, value in lam.items()}
        u = {name: value + nu[name] for name, value in u.items()} if nu else u
        with drawing_as(generator):
            products = gradient_along(losses.support, state, frozen, u)
        for name, product in products.items():
            if name in frozen:
                total[name] = total[name] + product
                continue
            lam[name] = lam[name] + inner.weight_decay * u[name] + product
            if nu:
                nu[name] = inner.momentum * u[name]
    return outcome(loss, logits, total | lam, fast)


def gradient_along(
    support_loss: SupportLoss, state: Fast, frozen: Params, direction: Params
) -> dict[str, Tensor]:
    """Differentiate the gradient of the support loss at ``state`` along a direction.

    Args:
        support_loss: of the parameters that adapt.
        state: parameters and buffers before an inner step.
        frozen: leaves on which the loss depends too.
        direction: by the names of ``state.params``.

    Returns:
        By name, for parameters of both kinds on which the loss depends at all; an inner step
        leaves the others alone.
    """
    with forward_ad.dual_level():
        params = {
            name: forward_ad.make_dual(value, direction[name])
            for name, value in state.params.items()
        }
        loss, _ = support_loss(params, state.buffers)
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
