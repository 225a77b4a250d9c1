"""Calls of a learner come one after the other, whichever threads make them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Class = TypeVar("Class")

LOCK = threading.RLock()
"""Held by each call of any learner in the process. A pass puts other tensors into the model, two
models may share layers, and random numbers and forward derivatives belong to the whole process."""


def alone(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function wait until no other thread is in such a function."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with LOCK:
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
