"""The meta-gradient with the memory of one inner step, by the adjoint, whatever the rule.

Adaptation runs without a graph and keeps the state before each inner step. The adjoint holds the
derivatives of the loss of the outer loop after a step: ``lam`` in the weights theta[t+1], ``nu`` in
the state of the rule. Going backward, each step turns it into the derivatives before the step;
the query loss there, if it counts, adds its own. The frozen parameters phi and the numbers that the
rule learns gather theirs. There are three ways to take such a step back.

``checkpointed`` runs the step again, with a graph, and takes its vector-Jacobian product (Chen et
al. 2016, arXiv 1604.06174, with the inner steps as the segments).

``mixed_mode`` takes the product of the update alone. It gives the derivatives in the weights, in
the state and in the learned numbers, and ``mu``, that in the gradient g of the support loss L. The
chain rule adds ``H(theta[t]) mu`` to lam, H the Hessian of L, which is symmetric, and
``d (g mu) / d phi`` for phi. Both are the directional derivative of one gradient, that of L in
(theta, phi), along (mu, 0): a forward derivative of a reverse one (Pearlmutter 1994; Kemaev et al.
2025, arXiv 2505.00793).

``first_order`` takes g for a constant, and leaves these products out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from raymaml.meta.gradients import EpisodeGradient, rule_names
from raymaml.meta.inner_loop import Adaptation, descended, step, unroll
from raymaml.passes.derivatives import Product
from raymaml.passes.draws import Generators, drawing_as, generators
from raymaml.types import Fast, Params, State, leaves


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One inner step that was taken: the state before it, and the gradients that the rule got."""

    before: Fast
    grads: Params
    product: Product | None
    """Derivatives of the gradient of the support loss, for a method that asks for them."""
    draws: Generators


@dataclass(frozen=True, kw_only=True)
class Adjoint:
    """Derivatives of the loss of the outer loop in weights and state, and those gathered so far."""

    lam: Params
    nu: State
    gathered: Params
    """In frozen parameters, and in the tensors that the rule learns."""


Keep = tuple[Literal["grads", "product"], ...]
"""Parts of an inner step that a method keeps beside the state before it."""
StepBack = Callable[[Adaptation, Taken, Adjoint], Adjoint]
"""(adaptation, a step, the adjoint after it) -> the adjoint before it."""


def checkpointed(adaptation: Adaptation) -> EpisodeGradient:
    """Compute the exact second-order gradient; each inner step runs twice."""

    def step_back(adaptation: Adaptation, taken: Taken, adjoint: Adjoint) -> Adjoint:
        after = step(adaptation, taken.before, create_graph=True)
        constants = adaptation.frozen | rule_names(adaptation.learned)
        return _pulled_back(adjoint, (after.params, after.state), taken.before, constants, {})[0]

    return _swept(adaptation, step_back, keep=())


def mixed_mode(adaptation: Adaptation) -> EpisodeGradient:
    """Compute the exact second-order gradient by Hessian-vector products, forward over reverse."""

    def step_back(adaptation: Adaptation, taken: Taken, adjoint: Adjoint) -> Adjoint:
        adjoint, mu = _through_update(adaptation, taken, adjoint)
        assert taken.product is not None
        products = taken.product(mu)
        lam = _added(adjoint.lam, products)
        if decay := adaptation.inner.weight_decay:
            lam = _added(lam, {name: decay * value for name, value in mu.items()})
        return replace(adjoint, lam=lam, gathered=_added(adjoint.gathered, products))

    return _swept(adaptation, step_back, keep=("grads", "product"))


def first_order(adaptation: Adaptation) -> EpisodeGradient:
    """Take the gradients of the inner steps for constants (FOMAML).

    By gradient descent with fixed rates this is the query gradient at the adapted weights.
    """

    def step_back(adaptation: Adaptation, taken: Taken, adjoint: Adjoint) -> Adjoint:
        return _through_update(adaptation, taken, adjoint)[0]

    changes = adaptation.inner.clip_between is not None or any(adaptation.weights[:-1])
    keep: Keep | None = ("grads",) if changes or not _is_constant(adaptation) else None
    return _swept(adaptation, step_back, keep=keep)


def _is_constant(adaptation: Adaptation) -> bool:
    """Return whether the derivative of the update is the same at all gradients and states."""
    return adaptation.rule.linear and not adaptation.learned


def _swept(adaptation: Adaptation, step_back: StepBack, *, keep: Keep | None) -> EpisodeGradient:
    """Adapt, then take the adjoint back through all steps, or through none if ``keep`` is None."""
    query, weights = adaptation.derivatives.query, adaptation.weights
    last, segments = (_adapted(adaptation), []) if keep is None else _forward(adaptation, keep)
    loss, logits, grads = query(last, weights[-1])
    learned = rule_names(adaptation.learned)
    gathered = {name: grads[name] for name in adaptation.frozen}
    adjoint = Adjoint(
        lam={name: grads[name] for name in last.params},
        nu={kind: _zeros(values) for kind, values in last.state.items()},
        gathered=gathered | _zeros(learned),
    )
    terms = [(weights[-1], logits)]
    for taken in _backward(segments):
        with drawing_as(taken.draws):
            adjoint = step_back(adaptation, taken, adjoint)
        if weight := weights[taken.before.steps]:
            with drawing_as(taken.draws):
                more, judged, grads = query(taken.before, weight)
            lam, gathered = (_added(part, grads) for part in (adjoint.lam, adjoint.gathered))
            adjoint = replace(adjoint, lam=lam, gathered=gathered)
            loss, terms = loss + more, [*terms, (weight, judged)]
    return EpisodeGradient(
        loss=loss,
        logits=logits,
        grads=adjoint.gathered | adjoint.lam,
        buffers=last.buffers,
        terms=tuple(terms),
    )


def _added(total: Params, more: Params) -> Params:
    """Return ``total`` with the derivatives of ``more`` that it has a place for."""
    return {name: v + more[name] if name in more else v for name, v in total.items()}


def _through_update(
    adaptation: Adaptation, taken: Taken, adjoint: Adjoint
) -> tuple[Adjoint, Params]:
    """Take the adjoint back through the update alone; also return mu."""
    grads, before = leaves(taken.grads), taken.before
    after = adaptation.update(grads, before.state, before.params, before.steps)
    return _pulled_back(adjoint, after, before, rule_names(adaptation.learned), grads)


def _pulled_back(
    adjoint: Adjoint, after: tuple[Params, State], before: Fast, constants: Params, grads: Params
) -> tuple[Adjoint, Params]:
    """Take the adjoint back from weights and state ``after`` a step, a graph on those before it;
    also return the derivative in ``grads``."""
    (params, state), kinds = after, list(before.state)
    outputs, along = [params, *state.values()], [adjoint.lam, *(adjoint.nu[kind] for kind in kinds)]
    inputs = [before.params, *(before.state[kind] for kind in kinds), constants, grads]
    found = iter(
        torch.autograd.grad(
            [value for part in outputs for value in part.values()],
            [value for part in inputs for value in part.values()],
            [part[name] for part, like in zip(along, outputs, strict=True) for name in like],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    lam, *nu, gained, mu = ({name: next(found) for name in part} for part in inputs)
    gathered, states = _added(adjoint.gathered, gained), dict(zip(kinds, nu, strict=True))
    return Adjoint(lam=lam, nu=states, gathered=gathered), mu


Segments = list[Callable[[], list[Taken]]]
"""Functions that return the steps of a run of inner steps."""


def _forward(adaptation: Adaptation, keep: Keep) -> tuple[Fast, Segments]:
    """Adapt; return the state at the end, and the segments of steps.

    Segments are of ``inner.keep_every`` steps, which are taken once more. One segment of all steps
    is kept as it was.
    """
    start, count, length = adaptation.start, adaptation.inner.num_steps, adaptation.inner.keep_every
    if not start.params:
        return _adapted(adaptation), []  # no step takes anything back if nothing adapts
    if length == 1:
        taken, last = _recorded(adaptation, count, start, keep)
        return last, [lambda: taken]
    segments: Segments = []
    fast = start
    for first in range(0, count, length):
        stop = min(first + length, count)
        segments.append(partial(_again, adaptation, stop, fast, generators(fast), keep))
        while fast.steps < stop:
            fast = step(adaptation, fast, create_graph=False)
    return fast, segments


def _backward(segments: Segments) -> Iterator[Taken]:
    """Yield the steps from the last on; each is gone after use, with all that it keeps."""
    while segments:
        steps = segments.pop()()
        while steps:
            yield steps.pop()


def _adapted(adaptation: Adaptation) -> Fast:
    *_, last = unroll(adaptation, create_graph=False)
    return last


def _again(
    adaptation: Adaptation, stop: int, fast: Fast, draws: Generators, keep: Keep
) -> list[Taken]:
    with drawing_as(draws):
        return _recorded(adaptation, stop, fast, keep)[0]


def _recorded(
    adaptation: Adaptation, stop: int, fast: Fast, keep: Keep
) -> tuple[list[Taken], Fast]:
    """Go on to ``stop`` steps; return the steps, and the state after them."""
    keep_grads = "grads" in keep and not _is_constant(adaptation)
    # Memory that is taken at once: small tensors that stay among large ones that go leave holes in
    # the heap, which grew by a third over 50 steps.
    kinds = {"params": fast.params, **fast.state, **({"grads": fast.params} if keep_grads else {})}
    memory = {
        kind: {name: v.new_empty(stop - fast.steps, *v.shape) for name, v in values.items()}
        for kind, values in kinds.items()
    }

    def kept(kind: str, values: Params) -> Params:
        rows, row = memory[kind], len(taken)
        return leaves({name: rows[name][row].copy_(v.detach()) for name, v in values.items()})

    taken: list[Taken] = []
    while fast.steps < stop:
        state = {kind: kept(kind, values) for kind, values in fast.state.items()}
        before = replace(fast, params=kept("params", fast.params), state=state)
        draws = generators(fast)
        fast, grads, product = descended(adaptation, before)
        if keep_grads:
            grads = kept("grads", grads)
        else:  # their names alone count
            grads = {name: v.new_zeros(()).expand_as(v) for name, v in grads.items()}
        product_kept = product if "product" in keep else None
        taken.append(Taken(before=before, grads=grads, product=product_kept, draws=draws))
    return taken, fast


def _zeros(values: Params) -> Params:
    return {name: torch.zeros_like(value) for name, value in values.items()}
