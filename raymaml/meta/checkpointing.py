"""The exact meta-gradient with the memory of one inner step: ``inner.gradient: checkpointed``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.meta.gradients import EpisodeGradient, EpisodeLosses, differentiate, outcome
from raymaml.meta.inner_loop import Fast, SupportLoss, step, unroll
from raymaml.types import Params

Generators = tuple[Tensor, dict[torch.device, Tensor]]
"""States of torch's generators: of the CPU, and of the GPUs that hold weights."""


def checkpointed(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Compute the exact second-order gradient with the memory of one inner step.

    Adaptation runs without a graph and keeps the start of each step, 1 or 2 copies of the
    parameters. Backward, each step runs again, with a graph, and its vector-Jacobian product takes
    the adjoint (the derivative of the query loss) from after the step to before it. (Chen et al.
    2016, arXiv 1604.06174, with the inner steps as the segments.)
    """
    states, fast = trajectory(losses.support, start, inner)
    loss, logits = losses.query(fast.params, fast.buffers)
    names = list(fast.params)
    grads = differentiate([loss], frozen | fast.params)
    total = {name: grads[name] for name in frozen}
    adjoint = [grads[name] for name in names]
    adjoint += [torch.zeros_like(value) for value in fast.velocity.values()]
    for state, generator in reversed(states):
        with drawing_as(generator):
            after = step(losses.support, state, inner, create_graph=True)
        before, outputs = _differentiable(state), list(_differentiable(after).values())
        grads = differentiate(outputs, before | frozen, adjoint)
        total = {name: value + grads[name] for name, value in total.items()}
        adjoint = [grads[name] for name in before]
    return outcome(loss, logits, total | dict(zip(names, adjoint, strict=False)), fast)


def trajectory(
    support_loss: SupportLoss, start: Fast, inner: InnerConfig
) -> tuple[list[tuple[Fast, Generators]], Fast]:
    """Adapt without a graph.

    The copies lie in memory that is taken at once: small tensors that stay among large ones that
    go leave holes in the heap, which grew by a third over 50 steps.

    Returns:
        The start of each inner step, with the states of torch's generators there (dropout draws
        from them), no steps if nothing adapts; and the adapted weights.
    """
    steps = inner.num_steps if start.params else 0
    params, velocity = _rows(start.params, steps), _rows(start.velocity, steps)
    states = []
    for number, fast in enumerate(unroll(support_loss, start, inner, create_graph=False)):
        if number < steps:
            for rows, values in ((params, fast.params), (velocity, fast.velocity)):
                for name, value in values.items():
                    rows[name][number] = value.detach()
            kept = replace(fast, params=_row(params, number), velocity=_row(velocity, number))
            states.append((kept.detached(), _generators(kept)))
    return states, fast


def _rows(like: Params, count: int) -> Params:
    """Return memory for ``count`` copies."""
    return {name: value.new_empty(count, *value.shape) for name, value in like.items()}


def _row(rows: Params, number: int) -> Params:
    return {name: value[number] for name, value in rows.items()}


def _generators(fast: Fast) -> Generators:
    devices = {value.device for value in fast.params.values() if value.is_cuda}
    return torch.get_rng_state(), {each: torch.cuda.get_rng_state(each) for each in devices}


@contextmanager
def drawing_as(generators: Generators) -> Iterator[None]:
    """Draw random numbers from these states in the block; the present ones stay."""
    cpu, others = generators
    with torch.random.fork_rng(devices=list(others)):
        torch.set_rng_state(cpu)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)
        yield


def _differentiable(fast: Fast) -> Params:
    """Return all that an inner step is differentiable in, velocities under names of their own."""
    return fast.params | {f"velocity of {name}": v for name, v in fast.velocity.items()}
