"""Calls of a learner: one after the other, whichever threads make them, and errors in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from raymaml.common.errors import UserError, reason_of
from raymaml.layers import LOCK

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Class = TypeVar("Class")

_AT_ONCE = ("vmap", "functorch", "Batching rule", "batched tensor", "broadcast shape")
_MESSAGES = {
    ("torch.utils.checkpoint",): "model: runs again in the backward pass ({reason}), where it has"
    " other weights than in the forward pass; take torch.utils.checkpoint out of it:"
    " inner.gradient: checkpointed saves the memory",
    ("forward AD", "forward mode AD", "support AD"): "inner.gradient: mixed_mode needs forward"
    " derivatives, and an operation of the model has none ({reason}); set inner.gradient:"
    " checkpointed or unrolled",
    _AT_ONCE: "cluster.episodes_per_chunk: an operation of the model cannot take several episodes"
    " at once ({reason}); set cluster.episodes_per_chunk: 1",
    ("derivative for ", "double backward", "once_differentiable", "differentiate twice"): "inner"
    ".gradient: an operation of the model has no second derivative ({reason}); set inner.gradient:"
    " first_order, or, where it is attention, let the encoder call it within"
    " torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
}
"""By words of PyTorch about an operation that lacks the derivatives that a method needs."""


@contextmanager
def derivatives_in_words(*, several: bool = False) -> Iterator[None]:
    """Turn errors of operations without the derivatives that a method needs into a ``UserError``.

    Args:
        several: whether the block takes several episodes at once, which an operation may not do.

    Raises:
        UserError: naming the operation, as PyTorch does, and the remedy.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        reason = reason_of(error).partition(". ")[0].removesuffix(".")
        for words, message in _MESSAGES.items():
            if (several or words != _AT_ONCE) and any(each in reason for each in words):
                raise UserError(message.format(reason=reason)) from error
        raise


def alone(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function wait until no other thread is in such a function."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with LOCK, derivatives_in_words():
            return method(*args, **kwargs)

    return call


def one_at_a_time(cls: type[Class]) -> type[Class]:
    """Let each public method, property and step of a generator run alone, and the constructor."""
    for name, value in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(alone(value.fget)))
        elif inspect.isgeneratorfunction(value):
            setattr(cls, name, _by_steps(value))
        elif inspect.isfunction(value):
            setattr(cls, name, alone(value))
    return cls


def _by_steps(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        steps = method(*args, **kwargs)
        following = alone(lambda: next(steps, steps))
        while (step := following()) is not steps:
            yield step

    return call
