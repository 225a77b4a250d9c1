"""The meta-gradient of one episode, by each method of ``inner.gradient``.

A method takes the two losses of an episode as functions of the parameters and returns the query
loss after adaptation, the query logits, and the gradient of that loss in ``params``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raymaml.config.schema import InnerConfig
from raymaml.meta.inner_loop import unroll
from raymaml.types import Params


@dataclass(frozen=True, kw_only=True)
class EpisodeLosses:
    """What the meta-gradient of one episode is made of."""

    support: Callable[[Params], Tensor]
    """Mean cross-entropy on the support set."""
    query: Callable[[Params], tuple[Tensor, Tensor]]
    """Mean cross-entropy on the query set, and the logits ``[N*Q, N]``."""


@dataclass(frozen=True, kw_only=True)
class EpisodeGradient:
    """The outcome of one episode, detached."""

    loss: Tensor  # []
    logits: Tensor  # [N*Q, N]
    grads: Params


def unrolled(losses: EpisodeLosses, params: Params, inner: InnerConfig) -> EpisodeGradient:
    """Differentiate through every inner step by the plain graph (MAML, exact second order)."""
    start = {name: value.detach().requires_grad_() for name, value in params.items()}
    *_, fast = unroll(losses.support, start, inner, create_graph=True)
    return _differentiate(losses, fast, start)


def first_order(losses: EpisodeLosses, params: Params, inner: InnerConfig) -> EpisodeGradient:
    """Take the query gradient at the adapted weights for the meta-gradient (FOMAML)."""
    *_, fast = unroll(losses.support, params, inner, create_graph=False)
    return _differentiate(losses, fast, fast)


def _differentiate(losses: EpisodeLosses, fast: Params, leaves: Params) -> EpisodeGradient:
    loss, logits = losses.query(fast)
    grads = torch.autograd.grad(loss, tuple(leaves.values()))
    return EpisodeGradient(
        loss=loss.detach(), logits=logits.detach(), grads=dict(zip(leaves, grads, strict=True))
    )


METHODS = {"unrolled": unrolled, "first_order": first_order}
