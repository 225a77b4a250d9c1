"""The meta-gradient of one episode, by the methods of ``inner.gradient``.

A method takes the adaptation to an episode. It returns the loss of the outer loop, the query logits
after the last inner step, and the gradient of that loss in the start of the adaptation, in the
frozen parameters, and in all that the rule learns. The loss is the query loss after the last inner
step, or a weighted sum of those after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymaml.meta.inner_loop import Adaptation, unroll
from raymaml.passes.derivatives import differentiated
from raymaml.passes.draws import drawing_as, generators
from raymaml.types import Buffers, Params


@dataclass(frozen=True, kw_only=True)
class EpisodeGradient:
    """The outcome of one episode, detached."""

    loss: Tensor  # []
    logits: Tensor  # [N*Q, N], or outputs [Q, ...]
    grads: Params
    buffers: Buffers
    """Moments after the last support pass; from a learner, the running ones alone."""
    terms: tuple[tuple[float, Tensor], ...] = ()
    """Weights and logits of the query losses that the loss is the sum of, from the last step on;
    empty: that after the last alone."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers about the computation, by name."""


Method = Callable[[Adaptation], EpisodeGradient]
"""Of ``inner.gradient``, or the difference that Reptile takes for it."""


def unrolled(adaptation: Adaptation) -> EpisodeGradient:
    """Differentiate through every inner step by the plain graph (MAML, exact second order)."""
    start, terms, judged = adaptation.start, [], []
    for fast in unroll(adaptation, create_graph=True):
        if weight := adaptation.weights[fast.steps]:
            last = fast.steps == adaptation.inner.num_steps
            with drawing_as(None if last else generators(start)):
                loss, logits = adaptation.query(fast)
            terms.append(weight * loss)
            judged.append((weight, logits.detach()))
    inputs = adaptation.frozen | rule_names(adaptation.learned) | start.params
    total = sum(terms[1:], terms[0])
    return EpisodeGradient(
        loss=total.detach(),
        logits=judged[-1][1],
        grads=differentiated(total, inputs),
        buffers=fast.buffers,
        terms=tuple(reversed(judged)),
    )


def reptile(adaptation: Adaptation) -> EpisodeGradient:
    """Take the way to the adapted weights, over the rate, for the gradient (Nichol et al. 2018)."""
    *_, fast = unroll(adaptation, create_graph=False)
    start, lr = adaptation.start.params, adaptation.inner.lr
    with torch.no_grad():
        loss, logits = adaptation.query(fast)
        grads = {name: (value - fast.params[name]) / lr for name, value in start.items()}
    still = {name: torch.zeros_like(value) for name, value in adaptation.frozen.items()}
    return EpisodeGradient(loss=loss, logits=logits, grads=still | grads, buffers=fast.buffers)


def rule_names(learned: Params) -> Params:
    """Return the rule's tensors under the names that the learner gives them: ``rule.NAME``."""
    return {f"rule.{name}": value for name, value in learned.items()}
