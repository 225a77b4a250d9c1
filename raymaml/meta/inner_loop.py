"""The inner loop: adaptation of the parameters to one support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.func import vmap

from raymaml.config.inner import InnerConfig
from raymaml.meta.rules import numbers_at
from raymaml.meta.rules.rule import Rule
from raymaml.passes.derivatives import ClippedBack, Derivatives, Product, differentiated_support
from raymaml.types import Buffers, Fast, Params, QueryLoss, State, SupportLoss


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The adaptation to one episode: where it starts, which loss it descends, and by which rule."""

    start: Fast
    support: SupportLoss
    query: QueryLoss
    """Of several episodes at once, along a leading axis E, both losses are sums."""
    derivatives: Derivatives
    """Of both losses, for methods that need no graph on the weights."""
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
        fast = step(adaptation, fast, create_graph=create_graph)
        yield fast


def step(adaptation: Adaptation, fast: Fast, *, create_graph: bool) -> Fast:
    """Take one inner step."""
    if not create_graph:
        return descended(adaptation, fast)[0]
    grads, buffers = differentiated_support(adaptation.support, fast, create_graph=True)
    return _updated(adaptation, fast, grads, buffers)[0]


def descended(adaptation: Adaptation, fast: Fast) -> tuple[Fast, Params, Product]:
    """Take one inner step without a graph; also return the gradients that the rule got, and the
    derivatives of those of the support loss."""
    found = adaptation.derivatives.support(fast)
    after, grads = _updated(adaptation, fast, found.grads, found.buffers)
    return after.detached(), grads, found.product


def _updated(
    adaptation: Adaptation, fast: Fast, grads: Params, buffers: Buffers
) -> tuple[Fast, Params]:
    """Apply the rule to gradients of the support loss; also return those that it got."""
    inner, params = adaptation.inner, fast.params
    if inner.weight_decay:
        grads = {name: g + inner.weight_decay * params[name] for name, g in grads.items()}
    if inner.proximal is not None:
        away = {name: params[name] - adaptation.start.params[name] for name in grads}
        grads = {name: g + inner.proximal * away[name] for name, g in grads.items()}
    moved, state = adaptation.update(grads, fast.state, params, fast.steps)
    return Fast(params=moved, state=state, buffers=buffers, steps=fast.steps + 1), grads
