"""RMSProp in the graph."""

from __future__ import annotations

from typing import ClassVar

import torch

from raymaml.meta.rules.rule import Meta, Rule
from raymaml.types import Params, State


class RMSProp(Rule):
    """s' = beta s + (1 - beta) g^2, at first g^2;  theta' = theta - lr g / sqrt(s' + epsilon).

    Of memory-efficient-maml: the average starts at the first square, and epsilon stands below the
    root.
    """

    numbers: ClassVar = {"beta": 0.9, "epsilon": 1e-6}

    def init(self, params: Params) -> State:
        """Return averages of squared gradients, which the first step replaces."""
        return {"square": {name: torch.zeros_like(value) for name, value in params.items()}}

    def update(
        self, grads: Params, state: State, params: Params, meta: Meta, step: int
    ) -> tuple[Params, State]:
        """Take one step."""
        beta, squares, moved = meta["beta"], dict(state["square"]), dict(params)
        for name, grad in grads.items():
            square = grad**2
            if step > 0:
                square = beta * squares[name] + (1 - beta) * square
            squares[name] = square
            scaled = grad / (square + meta["epsilon"]) ** 0.5
            moved[name] = params[name] - meta[f"lr.{name}"] * scaled
        return moved, {"square": squares}
