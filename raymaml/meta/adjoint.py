"""The exact meta-gradient with the memory of one inner step, by the adjoint.

Adaptation runs without a graph and keeps the state before each inner step. The adjoint holds the
derivatives of the query loss after a step: ``lam`` in the weights theta[t+1], ``nu`` in the
velocities v[t+1]. Going backward, each step turns it into the derivatives before the step, and the
frozen parameters phi gather theirs. There are two ways to take such a step back.

``checkpointed`` runs the step again, with a graph, and takes its vector-Jacobian product (Chen et
al. 2016, arXiv 1604.06174, with the inner steps as the segments).

``mixed_mode`` writes the product out. A step with gradient ``g(theta) = d L / d theta``, L the
support loss, is

    v[t+1] = momentum * v[t] + g(theta[t]) + decay * theta[t]
    theta[t+1] = theta[t] - lr * v[t+1]

so the chain rule gives

    u = nu - lr * lam                               the derivative in v[t+1], by both ways
    lam <- lam + decay * u + H(theta[t]) u          H the Hessian of L, which is symmetric
    nu <- momentum * u

and phi gathers ``d (g u) / d phi``. Both products are the directional derivative of one gradient,
that of L in (theta, phi) at (theta[t], phi) along (u, 0): a forward derivative of a reverse one
(Pearlmutter 1994; Kemaev et al. 2025, arXiv 2505.00793).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from raymaml.config.model import InnerConfig
from raymaml.meta.gradients import EpisodeGradient, EpisodeLosses, query_gradient
from raymaml.meta.inner_loop import Fast, SupportLoss, leaves, step, unroll
from raymaml.types import Params

Generators = tuple[Tensor, dict[torch.device, Tensor]]
"""States of torch's generators: of the CPU, and of the GPUs that hold weights."""
StepBack = Callable[[Fast, Params, Params], tuple[Params, Params, Params]]
"""(state before a step, lam, nu) -> lam and nu there, and what the derivatives in phi gain."""


def checkpointed(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Compute the exact second-order gradient; each inner step runs twice."""

    def step_back(state: Fast, lam: Params, nu: Params) -> tuple[Params, Params, Params]:
        after = step(losses.support, state, inner, create_graph=True)
        parts = (state.params, state.velocity, frozen)
        grads = torch.autograd.grad(
            [*after.params.values(), *after.velocity.values()],
            [value for part in parts for value in part.values()],
            [*lam.values(), *nu.values()],
            allow_unused=True,
            materialize_grads=True,
        )
        found = iter(grads)
        lam, nu, gained = ({name: next(found) for name in part} for part in parts)
        return lam, nu, gained

    return _swept(losses, frozen, start, inner, step_back)


def mixed_mode(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Compute the exact second-order gradient by Hessian-vector products, forward over reverse."""

    def step_back(state: Fast, lam: Params, nu: Params) -> tuple[Params, Params, Params]:
        u = {name: -state.rates[name] * value for name, value in lam.items()}
        u = {name: value + nu[name] for name, value in u.items()} if nu else u
        products = _gradient_along(losses.support, state, frozen, u)
        moved = [name for name in lam if name in products]  # a step leaves the others alone
        lam = lam | {n: lam[n] + inner.weight_decay * u[n] + products[n] for n in moved}
        nu = nu | {name: inner.momentum * u[name] for name in moved if nu}
        return lam, nu, {name: products[name] for name in frozen if name in products}

    make_forward_mode_ready()
    return _swept(losses, frozen, start, inner, step_back)


def _swept(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig, step_back: StepBack
) -> EpisodeGradient:
    states, fast = _trajectory(losses.support, start, inner)
    result = query_gradient(losses, fast, frozen | fast.params)
    total = {name: result.grads[name] for name in frozen}
    lam = {name: result.grads[name] for name in fast.params}
    nu = {name: torch.zeros_like(value) for name, value in fast.velocity.items()}
    for state, generators in reversed(states):
        with _drawing_as(generators):
            lam, nu, gained = step_back(state, lam, nu)
        total |= {name: total[name] + value for name, value in gained.items()}
    return replace(result, grads=total | lam)


def _gradient_along(
    support_loss: SupportLoss, state: Fast, frozen: Params, direction: Params
) -> Params:
    """Differentiate the gradient of the support loss along a direction, where there is one."""
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


def _trajectory(
    support_loss: SupportLoss, start: Fast, inner: InnerConfig
) -> tuple[list[tuple[Fast, Generators]], Fast]:
    """Return the state before each inner step, with torch's generators there; and that after."""
    count = inner.num_steps if start.params else 0  # no step takes anything back if nothing adapts
    # Memory that is taken at once: small tensors that stay among large ones that go leave holes in
    # the heap, which grew by a third over 50 steps.
    memory = [
        {name: value.new_empty(count, *value.shape) for name, value in part.items()}
        for part in (start.params, start.velocity)
    ]
    states = []
    for number, fast in enumerate(unroll(support_loss, start, inner, create_graph=False)):
        if number < count:
            params, velocity = (
                {name: rows[name][number].copy_(value.detach()) for name, value in part.items()}
                for rows, part in zip(memory, (fast.params, fast.velocity), strict=True)
            )
            kept = replace(fast, params=leaves(params), velocity=leaves(velocity))
            states.append((kept, _generators(fast)))
    return states, fast


def _generators(fast: Fast) -> Generators:
    devices = {value.device for value in fast.params.values() if value.is_cuda}
    return torch.get_rng_state(), {each: torch.cuda.get_rng_state(each) for each in devices}


@contextmanager
def _drawing_as(generators: Generators) -> Iterator[None]:
    """Draw random numbers from these states in the block; the present ones stay."""
    cpu, others = generators
    with torch.random.fork_rng(devices=list(others)):
        torch.set_rng_state(cpu)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)
        yield
