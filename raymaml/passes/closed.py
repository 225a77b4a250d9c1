"""The derivatives of a model that brings its passes in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.layers import Pass
from raymaml.passes.batches import rows_of
from raymaml.passes.derivatives import ByAutograd, Product, SupportGradient
from raymaml.passes.losses import loss_of
from raymaml.types import Buffers, Episode, EpisodeBatch, Fast, Params


class ClosedPass(Protocol):
    """A pass of an episode's images, or of those of several, which keeps its activations."""

    logits: Tensor  # [B, N], or [E, B, N] of several episodes

    @property
    def nbytes(self) -> int:
        """The memory of the activations, with those that ``gradient`` adds."""

    def gradient(self, labels: Tensor, names: Iterable[str]) -> Params:
        """Return the gradient of the mean cross-entropy of each episode, in those of the parameters
        ``names`` that it depends on."""

    def product(self, direction: Params) -> Params:
        """Return the derivative of the whole gradient along a direction, once there is one."""


ClosedForm = Callable[[Params, int, int], ClosedPass]
"""(weights, inner step, order) -> the pass of one set of images, in layers that the pass has set.

The order is that of the highest derivative that follows: 0, 1, or 2 for ``product``.
"""


@runtime_checkable
class InClosedForm(Protocol):
    """A model that brings passes in closed form."""

    def closed_form(self, current: Pass, params: Params, x: Tensor) -> ClosedForm | None:
        """Return the passes of images ``[B, C, H, W]``; None if there is no closed form for them.

        Args:
            current: purpose of the passes.
            params: parameters of the shapes and types of those to come.
            x: the images; of several episodes ``[E, B, C, H, W]``.
        """


Passing = Callable[[Fast, int], tuple[ClosedPass, Buffers]]
"""(all weights, order) -> the pass, and the moments after it."""
Passings = Callable[[Pass, Fast, Tensor], Passing | None]
"""(purpose, all weights, images) -> closed passes of these images, if any."""


@dataclass
class ByClosedForm:
    """The derivatives of an episode by closed passes; where there are none, PyTorch's.

    Of the activations of support passes, for products at the same weights, as many are kept as the
    budget has room for. The others are computed once more, to the same bits. Without a budget, a
    gradient prepares no product.

    Args:
        passings: gives the closed passes.
        episode: one, or several.
        frozen: parameters that the losses depend on beside those that adapt.
        batches: rows of the support set for each inner step; None: all.
        budget: bytes of activations.
        otherwise: where there are no closed passes.
    """

    passings: Passings
    episode: Episode | EpisodeBatch
    frozen: Params
    batches: Tensor | None
    budget: float
    otherwise: ByAutograd
    _kept: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary)
    """Bytes by pass."""
    _known: dict[Pass, Passing | None] = field(default_factory=dict)

    @torch.no_grad()
    def support(self, fast: Fast) -> SupportGradient:
        """See ``Derivatives``."""
        order = 2 if self.budget else 1
        if (found := self._support_pass(fast, order)) is None:
            with torch.enable_grad():
                return self.otherwise.support(fast)
        closed, labels, buffers = found
        grads = closed.gradient(labels, fast.params)
        kept: ClosedPass | None = None
        if order == 2 and sum(self._kept.values()) + (size := closed.nbytes) <= self.budget:
            self._kept[closed], kept = size, closed
        product = partial(self._product, fast, kept)
        return SupportGradient(grads, buffers, product)

    @torch.no_grad()
    def products(self, fast: Fast) -> Product:
        """See ``Derivatives``."""
        if (found := self._support_pass(fast, 2)) is None:
            return self.otherwise.products(fast)
        closed, labels, _ = found
        closed.gradient(labels, self.frozen | fast.params)
        return partial(self._product, fast, closed)

    @torch.no_grad()
    def query(self, fast: Fast, weight: float) -> tuple[Tensor, Tensor, Params]:
        """See ``Derivatives``."""
        if (found := self._passed("query", fast, self.episode.query_x, 1)) is None:
            with torch.enable_grad():
                return self.otherwise.query(fast, weight)
        (closed, _), params = found, self.frozen | fast.params
        several = isinstance(self.episode, EpisodeBatch)
        loss = loss_of(F.cross_entropy, closed.logits, self.episode.query_y, several=several)
        grads = closed.gradient(self.episode.query_y, params)
        grads = {
            name: grads[name] if name in grads else torch.zeros_like(value)
            for name, value in params.items()
        }
        if weight != 1:
            loss, grads = weight * loss, {name: weight * grad for name, grad in grads.items()}
        return loss, closed.logits, grads

    def _support_pass(self, fast: Fast, order: int) -> tuple[ClosedPass, Tensor, Buffers] | None:
        x, y = self.episode.support_x, self.episode.support_y
        if self.batches is not None:
            x, y = (rows_of(each, self.batches, fast.steps) for each in (x, y))
            self._known.pop("support", None)
        found = self._passed("support", fast, x, order)
        return None if found is None else (found[0], y, found[1])

    def _passed(
        self, current: Pass, fast: Fast, x: Tensor, order: int
    ) -> tuple[ClosedPass, Buffers] | None:
        everything = fast.among(self.frozen)
        if current not in self._known:
            self._known[current] = self.passings(current, everything, x)
        passing = self._known[current]
        return None if passing is None else passing(everything, order)

    @torch.no_grad()
    def _product(self, fast: Fast, closed: ClosedPass | None, direction: Params) -> Params:
        if closed is None:
            return self.products(fast)(direction)
        return closed.product(direction)
