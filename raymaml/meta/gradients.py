"""The meta-gradient of one episode, by the methods of ``inner.gradient``.

A method takes the two losses of an episode, which are functions of the adapting parameters. They
also depend on the frozen parameters, which are leaves. It returns the query loss after adaptation,
the query logits, and the gradient of that loss in the parameters of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.meta.inner_loop import Fast, SupportLoss, unroll
from raymaml.types import Buffers, Params


@dataclass(frozen=True, kw_only=True)
class EpisodeLosses:
    """The two losses of an episode, as functions of the parameters that adapt."""

    support: SupportLoss
    """Loss on the support set, and the moments after the pass."""
    query: Callable[[Params, Buffers], tuple[Tensor, Tensor]]
    """Loss on the query set, and the logits ``[N*Q, N]``, or outputs ``[Q, ...]``."""


@dataclass(frozen=True, kw_only=True)
class EpisodeGradient:
    """The outcome of one episode, detached."""

    loss: Tensor  # []
    logits: Tensor  # [N*Q, N], or outputs [Q, ...]
    grads: Params
    buffers: Buffers
    """Moments after the last support pass; from a learner, the running ones alone."""


Method = Callable[[EpisodeLosses, Params, Fast, InnerConfig], EpisodeGradient]
"""(losses, frozen parameters, start of those that adapt, inner loop) -> meta-gradient."""


def unrolled(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Differentiate through every inner step by the plain graph (MAML, exact second order)."""
    start = start.detached()
    *_, fast = unroll(losses.support, start, inner, create_graph=True)
    return query_gradient(losses, fast, frozen | start.params)


def first_order(
    losses: EpisodeLosses, frozen: Params, start: Fast, inner: InnerConfig
) -> EpisodeGradient:
    """Take the query gradient at the adapted weights as the meta-gradient (FOMAML)."""
    *_, fast = unroll(losses.support, start, inner, create_graph=False)
    return query_gradient(losses, fast, frozen | fast.params)


def query_gradient(losses: EpisodeLosses, fast: Fast, inputs: Params) -> EpisodeGradient:
    """Differentiate the query loss at ``fast``; the gradient is zero where it does not depend."""
    loss, logits = losses.query(fast.params, fast.buffers)
    grads = torch.autograd.grad(
        loss, list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    return EpisodeGradient(
        loss=loss.detach(),
        logits=logits.detach(),
        grads=dict(zip(inputs, grads, strict=True)),
        buffers=fast.buffers,
    )
