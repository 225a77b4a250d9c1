"""The inner loop: adaptation of the parameters to one support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from raymaml.config.schema import InnerConfig
from raymaml.meta import rules
from raymaml.types import Params


def unroll(
    support_loss: Callable[[Params], Tensor],
    params: Params,
    inner: InnerConfig,
    *,
    create_graph: bool,
) -> Iterator[Params]:
    """Yield the fast weights before the first inner step, then after each step (T + 1 in all).

    Finn et al. 2017, algorithm 1, lines 5 and 6; the only inner loop of the package, for training
    and evaluation alike.

    Args:
        support_loss: scalar loss on the support set as a function of the parameters.
        params: where adaptation starts.
        inner: number of steps and rates.
        create_graph: keep what yields differentiable in ``params`` (second order). Without it
            every yield is a set of fresh leaves, and no step outlives its use.
    """
    fast = params if create_graph else _leaves(params)
    yield fast
    for _ in range(inner.num_steps):
        grads = torch.autograd.grad(
            support_loss(fast), tuple(fast.values()), create_graph=create_graph
        )
        fast = rules.sgd(fast, dict(zip(fast, grads, strict=True)), inner)
        if not create_graph:
            fast = _leaves(fast)
        yield fast


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}
