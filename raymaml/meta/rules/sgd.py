"""Gradient descent."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from raymaml.meta.rules.rule import Meta, Rule
from raymaml.types import Params, State


class SGD(Rule):
    """v' = momentum v + g;  theta' = theta - lr v', as ``torch.optim.SGD``."""

    numbers: ClassVar = {"momentum": 0.0}
    linear = True

    def init(self, params: Params) -> State:
        """Return velocities at rest; none without momentum."""
        if self.fixed.get("momentum") == 0:
            return {}
        return {"velocity": {name: torch.zeros_like(value) for name, value in params.items()}}

    def update(
        self, grads: Params, state: State, params: Params, meta: Meta, step: int
    ) -> tuple[Params, State]:
        """Take one step."""
        moves = dict(grads)
        if state:
            for name, grad in grads.items():
                moves[name] = grad + meta["momentum"] * state["velocity"][name]
            state = {"velocity": state["velocity"] | moves}
        moved = {
            name: _less(params[name], meta[f"lr.{name}"], move) for name, move in moves.items()
        }
        return params | moved, state


def _less(value: Tensor, rate: float | Tensor, move: Tensor) -> Tensor:
    """Return ``value - rate move``, of a fixed rate in one operation."""
    return value.sub(move, alpha=rate) if isinstance(rate, float) else value - rate * move
