"""Episodes with quadratic losses, and their meta-gradients as products of matrices, in numpy.

The model is linear: outputs x phi, phi = (encoder.weight [1, 2], head.weight [1, 3]). Half the sum
of squared errors is 1/2 |X phi - y|^2, with the gradient A phi - b, A = X^T X, b = X^T y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymaml.config.inner import InnerConfig
from raymaml.meta.learner import MetaLearner
from raymaml.types import Episode

STEPS = 3
WIDTHS = {"encoder.weight": 2, "head.weight": 3}
TENSOR = np.repeat([0, 1], list(WIDTHS.values()))
"""The tensor of each number of phi."""
SIZE = len(TENSOR)
Array = Any


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x[:, :2]) + self.head(x[:, 2:])


def half_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


def line(**inner: Any) -> MetaLearner:
    torch.manual_seed(3)
    config = InnerConfig(**{"num_steps": STEPS, "lr": 0.1, "head_lr": 0.05, **inner})
    return MetaLearner(Line().double(), config, loss_fn=half_of_squares)


def episode() -> Episode:
    """Eigenvalues of both matrices lie between 0.3 and 3."""
    drawn = np.random.default_rng(0)
    sets = {}
    for name in ("support", "query"):
        x = np.eye(SIZE) + 0.15 * drawn.standard_normal((SIZE, SIZE))
        sets |= {f"{name}_x": x, f"{name}_y": drawn.standard_normal((SIZE, 1))}
    return Episode(**{name: torch.from_numpy(value) for name, value in sets.items()})


def matrix(name: str) -> tuple[Array, Array]:
    """Return A and b of the support or the query loss."""
    sets = vars(episode())
    x, y = sets[f"{name}_x"].numpy(), sets[f"{name}_y"].numpy()[:, 0]
    return x.T @ x, x.T @ y


def joined(values: dict[str, Tensor]) -> Array:
    return np.concatenate([values[name].detach().numpy().ravel() for name in WIDTHS])


@dataclass
class Step:
    """One step by hand: values (phi, state) after it, and its derivatives."""

    after: Array
    jacobian: Array
    """Of ``after`` in (phi, state) before the step."""
    move: Array
    """phi' = ... - rate move, by number of phi."""
    numbers: dict[str, Array] = field(default_factory=dict)
    """Derivatives of ``after`` in the numbers of the rule: a vector, or columns."""


Rule = Callable[[Array, int], Step]
"""(phi and state, number of the step) -> the step."""


def by_hand(
    rule: Rule,
    start: Array,
    *,
    weights: tuple[float, ...] = (0, 0, 0, 1),
    clip: float = np.inf,
) -> dict[str, Array]:
    """Return ``theta`` [P], ``rates`` [T, P] and the numbers' derivatives: the product of matrices.

    Args:
        rule: the steps.
        start: phi, and the state before the first step.
        weights: of the query losses after 0..T steps.
        clip: limit of the norm of the derivatives that go back from phi' of each step.
    """
    (b, c), taken, values = matrix("query"), [], start
    for number in range(STEPS):
        taken.append((values, rule(values, number)))
        values = taken[-1][1].after
    found: dict[str, Array] = {"rates": np.zeros((STEPS, SIZE))}
    lam = np.zeros_like(start)
    for number in reversed(range(STEPS)):
        step = taken[number][1]
        lam[:SIZE] += weights[number + 1] * (b @ step.after[:SIZE] - c)
        lam[:SIZE] *= min(1, clip / np.linalg.norm(lam[:SIZE]))
        found["rates"][number] = -lam[:SIZE] * step.move
        for name, derivative in step.numbers.items():
            found[name] = found.get(name, 0) + derivative.T @ lam
        lam = step.jacobian.T @ lam
    return found | {"theta": lam[:SIZE]}
