"""A user's own update rule: its mistakes as one message, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raymaml.common.errors import UserError
from raymaml.types import Params, leaves


@contextmanager
def named(problem: str) -> Iterator[None]:
    """Turn any error of the block into a ``UserError`` that begins with ``problem``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise UserError(f"inner.rule: {problem} ({type(error).__name__}: {error})") from error


def require_rule(
    name: str, init: Callable[..., Any], update: Callable[..., Any], params: Params, meta: Any
) -> None:
    """Try a step of a rule, on copies of the parameters and gradients of ones.

    Args:
        name: of the rule, for messages.
        init: parameters -> state.
        update: (gradients, state, parameters, meta, step) -> parameters and state.
        params: those that adapt.
        meta: the numbers and rates of the first step.

    Raises:
        UserError: it raises, or loses parameters or state, or changes a shape.
    """
    before = leaves({key: value.clone() for key, value in params.items()})
    ones = {key: torch.ones_like(value) for key, value in params.items()}
    with named(f"{name} fails in a trial step"), torch.random.fork_rng(devices=[]):
        state = init(before)
        wanted = {"parameters": _shapes(before)} | {f"state {k}": _shapes(state[k]) for k in state}
        moved, after = update(ones, state, before, meta, 0)
        found = {"parameters": _shapes(moved)} | {f"state {k}": _shapes(after[k]) for k in after}
    for kind in wanted | found:
        old, new = wanted.get(kind, {}), found.get(kind, {})
        if wrong := [each for each in old | new if old.get(each) != new.get(each)]:
            raise UserError(
                f"inner.rule: {name}: {kind}: {wrong[0]} is of shape {old.get(wrong[0], 'none')}"
                f" before a step, and {new.get(wrong[0], 'none')} after it",
                remedy="update returns every parameter and all state, in their shapes",
            )


def _shapes(values: dict[str, Tensor]) -> dict[str, list[int]]:
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} is of type {type(value).__name__}, and must be a tensor")
    return {key: list(value.shape) for key, value in values.items()}
