"""The derivatives of a model that brings its passes in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor

from raymaml.layers import Pass
from raymaml.passes.batches import rows_of
from raymaml.passes.derivatives import ByAutograd, Product, SupportGradient
from raymaml.types import Buffers, Episode, Fast, Params


class ClosedPass(Protocol):
    """One pass of images through a model, which keeps its activations."""

    logits: Tensor  # [B, N]

    @property
    def nbytes(self) -> int:
        """The memory of the activations, in bytes."""

    def gradient(self, labels: Tensor, names: Iterable[str]) -> tuple[Tensor, Params]:
        """Return the mean cross-entropy, and its gradient in those of the parameters ``names`` that
        it depends on."""

    def product(self, direction: Params) -> Params:
        """Return the derivative of the whole gradient along a direction, once there is one."""


ClosedForm = Callable[[Params], ClosedPass]
"""Passes of one set of images at given weights, in layers that the pass has set."""


@runtime_checkable
class InClosedForm(Protocol):
    """A model that brings passes in closed form."""

    def closed_form(
        self, current: Pass, params: Params, x: Tensor, *, value_alone: bool
    ) -> ClosedForm | None:
        """Return the passes of images ``[B, C, H, W]``; None if there is no closed form for them.

        Args:
            current: purpose of the passes.
            params: parameters of the shapes and types of those to come.
            x: the images.
            value_alone: no gradient follows.
        """


Passing = Callable[[Fast], tuple[ClosedPass, Buffers]]
"""All weights -> the pass, and the moments after it."""
Passings = Callable[[Pass, Fast, Tensor], Passing | None]
"""(purpose, all weights, images) -> closed passes of these images, if there are any."""


@dataclass
class ByClosedForm:
    """The derivatives of an episode by closed passes; where there are none, PyTorch's.

    Of the activations of support passes, for products at the same weights, as many are kept as the
    budget has room for. The others are computed once more, to the same bits.

    Args:
        passings: gives the closed passes.
        episode: the episode.
        frozen: parameters that the losses depend on beside those that adapt.
        batches: rows of the support set for each inner step; None: all.
        budget: bytes of activations.
        otherwise: where there are no closed passes.
    """

    passings: Passings
    episode: Episode
    frozen: Params
    batches: Tensor | None
    budget: float
    otherwise: ByAutograd
    _kept: WeakSet[Any] = field(default_factory=WeakSet)
    _of_support: list[Passing | None] = field(default_factory=list)
    _of_query: list[Passing | None] = field(default_factory=list)

    @torch.no_grad()
    def support(self, fast: Fast) -> SupportGradient:
        """See ``Derivatives``."""
        if (found := self._support_pass(fast)) is None:
            with torch.enable_grad():
                return self.otherwise.support(fast)
        closed, labels, buffers = found
        _, grads = closed.gradient(labels, fast.params)
        fits = sum(each.nbytes for each in self._kept) + closed.nbytes <= self.budget
        if fits:
            self._kept.add(closed)
        product = partial(self._product, fast, closed if fits else None)
        return SupportGradient(grads, buffers, product)

    @torch.no_grad()
    def products(self, fast: Fast) -> Product:
        """See ``Derivatives``."""
        if (found := self._support_pass(fast)) is None:
            return self.otherwise.products(fast)
        closed, labels, _ = found
        closed.gradient(labels, self.frozen | fast.params)
        return partial(self._product, fast, closed)

    @torch.no_grad()
    def query(self, fast: Fast, weight: float) -> tuple[Tensor, Tensor, Params]:
        """See ``Derivatives``."""
        params = self.frozen | fast.params
        everything = fast.among(self.frozen)
        if not self._of_query:
            self._of_query.append(self.passings("query", everything, self.episode.query_x))
        if (passing := self._of_query[0]) is None:
            with torch.enable_grad():
                return self.otherwise.query(fast, weight)
        closed, _ = passing(everything)
        loss, grads = closed.gradient(self.episode.query_y, params)
        weighted = {
            name: weight * grads[name] if name in grads else torch.zeros_like(value)
            for name, value in params.items()
        }
        return weight * loss, closed.logits, weighted

    def _support_pass(self, fast: Fast) -> tuple[ClosedPass, Tensor, Buffers] | None:
        x, y, everything = self.episode.support_x, self.episode.support_y, fast.among(self.frozen)
        if self.batches is not None:
            x, y = (rows_of(each, self.batches, fast.steps) for each in (x, y))
        if self.batches is not None or not self._of_support:
            self._of_support = [self.passings("support", everything, x)]
        if (passing := self._of_support[0]) is None:
            return None
        closed, buffers = passing(everything)
        return closed, y, buffers

    @torch.no_grad()
    def _product(self, fast: Fast, closed: ClosedPass | None, direction: Params) -> Params:
        if closed is None:
            return self.products(fast)(direction)
        return closed.product(direction)
