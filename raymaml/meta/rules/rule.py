"""An update rule of the inner loop: a pair of pure functions, and its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from raymaml.types import Params, State

Meta = Mapping[str, Any]
"""The numbers and tensors of a rule by name, and the rate of each parameter: ``lr.NAME``. A
learned one is a tensor, any other a float. A rate broadcasts to its parameter."""


class Rule(ABC):
    """An update rule, as a transformation of optax: ``init`` and ``update`` change nothing.

    Args:
        args: numbers that replace the defaults.
        learned: names of the numbers that the outer loop learns.
    """

    numbers: ClassVar[Mapping[str, float]] = {}
    """The numbers of the rule, with their defaults."""
    linear: ClassVar[bool] = False
    """Whether the derivative of ``update`` in gradients, state and parameters is the same at all of
    them."""

    def __init__(self, args: Mapping[str, float], learned: Collection[str] = ()) -> None:
        values = {**self.numbers, **args}
        self.fixed = {name: value for name, value in values.items() if name not in learned}
        self.learned = {name: value for name, value in values.items() if name in learned}

    def tensors(self, params: Params, num_steps: int, lr: float, seed: int) -> Params:
        """Return tensors that the rule learns beside its numbers, as they start.

        Args:
            params: those that adapt.
            num_steps: inner steps of training (T).
            lr: inner rate of the encoder.
            seed: of random numbers.
        """
        del params, num_steps, lr, seed
        return {}

    @abstractmethod
    def init(self, params: Params) -> State:
        """Return the state before the first step."""

    @abstractmethod
    def update(
        self, grads: Params, state: State, params: Params, meta: Meta, step: int
    ) -> tuple[Params, State]:
        """Return parameters and state after a step: new dictionaries.

        Args:
            grads: gradients of the support loss; a parameter without one stays as it is.
            state: as ``init`` or the step before returned it.
            params: the parameters that adapt.
            meta: the numbers of the rule, its tensors, and the rates ``lr.NAME``.
            step: number of the step, from 0.
        """
