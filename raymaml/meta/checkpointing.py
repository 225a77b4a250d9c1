"""The exact meta-gradient with the memory of one inner step: ``inner.gradient: checkpointed``."""

from __future__ import annotations

import torch
from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.meta.gradients import EpisodeGradient, EpisodeLosses, differentiate, outcome
from raymaml.meta.inner_loop import Fast, leaves, step, unroll
from raymaml.types import Params


def checkpointed(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Compute the exact second-order gradient with the memory of one inner step.

    Adaptation runs without a graph and keeps what each step starts from, 1 or 2 copies of the
    parameters. Backward, each step runs again, with a graph, and its vector-Jacobian product takes
    the adjoint (the derivative of the query loss) from after the step to before it. (Chen et al.
    2016, arXiv 1604.06174, with the inner steps as the segments.)
    """
    frozen = leaves(frozen)
    losses = losses.with_frozen(frozen)
    before, states = [], unroll(losses.support, start, inner, create_graph=False)
    for fast in states:
        before.append((fast, torch.get_rng_state()))  # the step draws from it, if there is dropout
    fast, _ = before.pop()
    loss, logits = losses.query(fast.params, fast.buffers)
    names = list(fast.params)
    grads = differentiate([loss], frozen | fast.params)
    total = {name: grads[name] for name in frozen}
    adjoint = [grads[name] for name in names]
    adjoint += [torch.zeros_like(value) for value in fast.velocity.values()]
    for state, generator in reversed(before if names else []):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator)
            after = step(losses.support, state, inner, create_graph=True)
        grads = differentiate(_outputs(after), _inputs(state) | frozen, adjoint)
        total = {name: value + grads[name] for name, value in total.items()}
        adjoint = [grads[name] for name in _inputs(state)]
    return outcome(loss, logits, total | dict(zip(names, adjoint, strict=False)), fast)


def _inputs(fast: Fast) -> Params:
    """What one inner step is differentiable in, velocities under names of their own."""
    return fast.params | {f"velocity of {name}": v for name, v in fast.velocity.items()}


def _outputs(fast: Fast) -> list[Tensor]:
    return [*fast.params.values(), *fast.velocity.values()]
