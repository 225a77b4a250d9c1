"""A user's own update rule, by import path, and things that are none."""

from __future__ import annotations

from typing import Any

import torch

import raymaml

NotAClass = 3


class NotARule:
    """Derives from nothing."""


class Damped(raymaml.Rule):
    """m' = memory m + g;  theta' = theta - lr gain m' / sqrt(1 + damping m'^2)."""

    numbers = {"memory": 0.5, "damping": 2.0}  # noqa: RUF012

    def tensors(self, params: Any, num_steps: int, lr: float, seed: int) -> Any:
        return {f"gain.{name}": torch.ones((), dtype=v.dtype) for name, v in params.items()}

    def init(self, params: Any) -> Any:
        return {"mean": {name: torch.zeros_like(value) for name, value in params.items()}}

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        means, moved = dict(state["mean"]), dict(params)
        for name, grad in grads.items():
            mean = means[name] = meta["memory"] * means[name] + grad
            size = meta[f"lr.{name}"] * meta[f"gain.{name}"]
            moved[name] = params[name] - size * mean / (1 + meta["damping"] * mean**2) ** 0.5
        return moved, {"mean": means}


class Raises(Damped):
    """Fails in a step."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        raise ValueError("boom")


class Forgets(Damped):
    """Returns what it has changed alone: all but one parameter."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        moved, state = super().update(grads, state, params, meta, step)
        return dict(list(moved.items())[1:]), state


class ForgetsState(Damped):
    """Returns no state."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        return super().update(grads, state, params, meta, step)[0], {}


class Scalars(Damped):
    """Returns one number for each parameter."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        moved, state = super().update(grads, state, params, meta, step)
        return {name: value.sum() for name, value in moved.items()}, state


class InPlace(Damped):
    """Changes the parameters that it got."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        for name, grad in grads.items():
            params[name] -= grad
        return params, state


class Arrays(Damped):
    """Returns arrays of NumPy."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        return {name: value.detach().numpy() for name, value in params.items()}, state


class Flat(Damped):
    """Keeps a state by name alone."""

    def init(self, params: Any) -> Any:
        return {name: torch.zeros_like(value) for name, value in params.items()}


class Unfinished(raymaml.Rule):
    """Has no ``init``."""

    def update(self, grads: Any, state: Any, params: Any, meta: Any, step: int) -> Any:
        raise NotImplementedError
