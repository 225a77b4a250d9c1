"""ALFA: rates and decays that a small network sets at each step (Baik et al. 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from raymaml.layers import row_of_step
from raymaml.meta.rules.rule import Meta, Rule
from raymaml.types import Params, State


class ALFA(Rule):
    """theta' = (1 - b decay) theta - a lr g by tensor; a, b = network(mean theta, mean g).

    Two linear layers with a ReLU between see the means of all tensors. Each tensor learns a decay
    for each step beside. The output starts at 1: at first the rule is gradient descent with decay.
    """

    numbers: ClassVar = {"decay": 5e-4}

    def tensors(self, params: Params, num_steps: int, lr: float, seed: int) -> Params:
        """Return the weights of the network, and decays ``decay.NAME`` [T]."""
        count, some = 2 * len(params), next(iter(params.values()))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(count, count, generator=generator, dtype=torch.float64)
        decay = lr * {**self.fixed, **self.learned}["decay"]
        return {
            "hidden.weight": ((2 * drawn - 1) / count**0.5).to(some),
            "hidden.bias": some.new_zeros(count),
            "output.weight": some.new_zeros(count, count),
            "output.bias": some.new_ones(count),
            **{f"decay.{name}": some.new_full((num_steps,), decay) for name in params},
        }

    def init(self, params: Params) -> State:
        """Return no state."""
        return {}

    def update(
        self, grads: Params, state: State, params: Params, meta: Meta, step: int
    ) -> tuple[Params, State]:
        """Take one step."""
        means = [value.mean() for value in params.values()]
        means += [grads[name].mean() if name in grads else means[0] * 0 for name in params]
        hidden = F.relu(meta["hidden.weight"] @ torch.stack(means) + meta["hidden.bias"])
        a, b = (meta["output.weight"] @ hidden + meta["output.bias"]).chunk(2)
        moved, numbers = dict(params), {name: number for number, name in enumerate(params)}
        for name, grad in grads.items():
            decays, number = meta[f"decay.{name}"], numbers[name]
            decay = decays[row_of_step(decays, step)]
            kept = (1 - b[number] * decay) * params[name]
            moved[name] = kept - a[number] * meta[f"lr.{name}"] * grad
        return moved, state
