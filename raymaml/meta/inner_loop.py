"""The inner loop: adaptation of the parameters to one support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap

from raymaml.config.inner import InnerConfig
from raymaml.meta.rules import numbers_at
from raymaml.meta.rules.rule import Rule
from raymaml.passes.derivatives import ClippedBack
from raymaml.types import Buffers, Fast, Params, QueryLoss, State, SupportLoss


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The adaptation to one episode: where it starts, which loss it descends, and by which rule."""

    start: Fast
    support: SupportLoss
    query: QueryLoss
    """Of several episodes at once, along a leading axis E, both losses are sums."""
    frozen: Params
    """Leaves that the losses depend on beside the parameters that adapt."""
    learned: Params
    """Leaves that the rule depends on: rates and numbers that the outer loop learns."""
    rule: Rule
    inner: InnerConfig
    head: str
    weights: tuple[float, ...]
    """Of the query losses after 0..T inner steps in the objective of the outer loop."""
    several: bool = False
    """Whether all tensors have the leading axis E."""

    def update(
        self, grads: Params, state: State, params: Params, steps: int
    ) -> tuple[Params, State]:
        """Apply the rule to gradients, after ``steps`` steps."""

        def rule(grads: Params, state: State, params: Params, learned: Params) -> Any:
            meta = numbers_at(self.inner, self.rule, learned, params, head=self.head, step=steps)
            return self.rule.update(grads, state, params, meta, steps)

        call: Callable[..., tuple[Params, State]] = vmap(rule) if self.several else rule
        moved, state = call(grads, state, params, self.learned) if params else (params, state)
        if self.inner.clip_between is not None and moved:
            found = ClippedBack.apply(self.inner.clip_between, self.several, *moved.values())
            moved = dict(zip(moved, found, strict=True))
        return moved, state


def unroll(adaptation: Adaptation, *, create_graph: bool) -> Iterator[Fast]:
    """Yield the fast weights before the first inner step, then after each step (T + 1 in all).

    Finn et al. 2017, algorithm 1, lines 5 and 6; the only inner loop of the package, for training
    and evaluation alike.

    Args:
        adaptation: its start, support loss, rule and number of steps.
        create_graph: keep the weights differentiable in the start (second order). Without it the
            weights are fresh leaves after each step, and the graph of a step is freed after use.
    """
    fast = adaptation.start
    yield fast
    for _ in range(adaptation.inner.num_steps):
        fast, _ = step(adaptation, fast, create_graph=create_graph)
        yield fast


def step(adaptation: Adaptation, fast: Fast, *, create_graph: bool) -> tuple[Fast, Params]:
    """Take one inner step; also return the gradients that the rule got."""
    grads, buffers = support_gradient(adaptation, fast, create_graph=create_graph)
    params, state = adaptation.update(grads, fast.state, fast.params, fast.steps)
    after = Fast(params=params, state=state, buffers=buffers, steps=fast.steps + 1)
    return after if create_graph else after.detached(), grads


def support_gradient(
    adaptation: Adaptation, fast: Fast, *, create_graph: bool
) -> tuple[Params, Buffers]:
    """Return the gradients for the rule, of parameters that the loss depends on, and moments."""
    inner, params = adaptation.inner, fast.params
    loss, buffers = adaptation.support(fast)
    if not params:  # all is frozen, and autograd refuses to have nothing to do
        return {}, buffers
    values = list(params.values())
    found = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
    grads = {name: g for name, g in zip(params, found, strict=True) if g is not None}
    if inner.weight_decay:
        grads = {name: g + inner.weight_decay * params[name] for name, g in grads.items()}
    if inner.proximal is not None:
        away = {name: params[name] - adaptation.start.params[name] for name in grads}
        grads = {name: g + inner.proximal * away[name] for name, g in grads.items()}
    return grads, buffers
