"""Adam in the graph (Kingma and Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch

from raymaml.meta.rules.rule import Meta, Rule
from raymaml.types import Params, State


class Adam(Rule):
    """m' = beta1 m + (1 - beta1) g;  s' = beta2 s + (1 - beta2) g^2;  with t = step + 1
    theta' = theta - lr m' / (1 - beta1^t) / (sqrt(s' / (1 - beta2^t)) + epsilon).

    Where all gradients were zero the step is zero, and so are its derivatives, which are 0/0.
    """

    numbers: ClassVar = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}

    def init(self, params: Params) -> State:
        """Return the averages of gradients and of their squares, which are zero."""
        return {
            kind: {name: torch.zeros_like(value) for name, value in params.items()}
            for kind in ("mean", "square")
        }

    def update(
        self, grads: Params, state: State, params: Params, meta: Meta, step: int
    ) -> tuple[Params, State]:
        """Take one step."""
        beta1, beta2 = meta["beta1"], meta["beta2"]
        means, squares, moved = dict(state["mean"]), dict(state["square"]), dict(params)
        for name, grad in grads.items():
            mean = means[name] = beta1 * means[name] + (1 - beta1) * grad
            square = squares[name] = beta2 * squares[name] + (1 - beta2) * grad**2
            seen = square > 0
            root = (torch.where(seen, square, 1) / (1 - beta2 ** (step + 1))) ** 0.5
            scaled = mean / (1 - beta1 ** (step + 1)) / (root + meta["epsilon"])
            moved[name] = params[name] - meta[f"lr.{name}"] * torch.where(seen, scaled, 0)
        return moved, {"mean": means, "square": squares}
