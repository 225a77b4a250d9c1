"""Adam in the graph (Kingma and Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from raymaml.meta.rules.rule import Meta, Rule
from raymaml.types import Params, State


class Adam(Rule):
    """m' = m + w1 (g - m);  s' = s + w2 (g^2 - s);  theta' = theta - lr m' / (sqrt(s') + epsilon).

    With w = (1 - beta) / (1 - beta^(step + 1)) these are the paper's averages after its correction
    of their bias. In the paper's order, rounding to float32 would decide derivatives in a beta.
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
        w1, w2 = (_newest(meta[name], step) for name in ("beta1", "beta2"))
        means, squares, moved = dict(state["mean"]), dict(state["square"]), dict(params)
        for name, grad in grads.items():
            mean = means[name] = means[name] + w1 * (grad - means[name])
            square = squares[name] = squares[name] + w2 * (grad**2 - squares[name])
            seen = square > 0
            scaled = mean / (torch.where(seen, square, 1) ** 0.5 + meta["epsilon"])
            moved[name] = params[name] - meta[f"lr.{name}"] * torch.where(seen, scaled, 0)
        return moved, {"mean": means, "square": squares}


def _newest(beta: Any, step: int) -> Any:
    """Return the weight w of the newest, as 1 / (1 + beta + ... + beta^step)."""
    total = 1.0
    for _ in range(step):
        total = 1 + beta * total
    return 1 / total
