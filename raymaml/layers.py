"""The passes of an episode through a model, and layers that behave differently in each."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

LOCK = threading.RLock()
"""Held by every call of any learner in the process, and while a model is built. A pass puts other
tensors into the model, two models may share layers, and random numbers and forward derivatives
belong to the whole process."""

TRACKING = nn.modules.batchnorm._NormBase
"""The base of PyTorch's batch and instance norms and their subclasses, which may keep moments."""

CONTAINERS = (list, tuple, set, frozenset, deque)
"""Containers that are searched for modules and tensors, as dictionaries are."""
ATOMS = {bool, int, float, str, type(None)}
"""Types that hold neither."""
BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""Hooks and flags of every module: a pass leaves them alone, since to copy them takes long."""


def row_of_step(rows: Tensor, step: int) -> int:
    """Return the row, of T, that belongs to an inner step; further steps take the last."""
    return min(step, len(rows) - 1)


def tracking_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers that keep moments and behave alike in all passes."""
    return [
        name
        for name, module in reachable_modules(model).items()
        if isinstance(module, TRACKING) and module.track_running_stats
    ]


def reachable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return each module once by name: submodules, and those in plain attributes and containers."""
    found = dict(model.named_modules())
    known = set(map(id, found.values()))
    waiting = list(found.items())
    while waiting:
        name, module = waiting.pop()
        for place, other in _places_of(name, module):
            if id(other) not in known:
                known.add(id(other))
                found[place] = other
                waiting.append((place, other))
    return found


def plain_places(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that plain attributes and containers hold, by place; also submodules."""
    return {
        place: other
        for name, module in reachable_modules(model).items()
        for place, other in _places_of(name, module, {"_modules"})
    }


def _places_of(
    name: str, module: nn.Module, left_out: Set[str] = frozenset()
) -> Iterator[tuple[str, nn.Module]]:
    for key, value in vars(module).items():
        if key not in left_out:
            place = name if key == "_modules" else f"{name}.{key}".lstrip(".")
            yield from _modules_in(value, place)


def _modules_in(value: Any, place: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _modules_in(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, CONTAINERS):
        for number, item in enumerate(value):
            yield from _modules_in(item, f"{place}.{number}")


Pass = Literal["support", "context", "query"]
"""The purpose of a forward pass of an episode: ``support`` adapts on the support set, ``context``
reads the support set once more with the adapted weights, ``query`` predicts the query set."""


Rules = Literal["torch", "composed", "closed"]
"""The derivatives that a pass needs. ``torch``: PyTorch's kernels, which can be differentiated
backward again. ``composed``: functions of PyTorch that can be differentiated forward over backward
and vectorised. ``closed``: raymaml's own rules, for one backward pass, and forward over it for the
derivatives along the direction alone."""


class OwnRules(nn.Module):
    """A layer with derivatives of its own; the code that runs a pass sets these."""

    rules: Rules = "torch"
    kernels: bool = False
    """Whether closed rules use raymaml's kernels, where they are for the tensors."""
    several: bool = False
    """Whether vmap takes several episodes at once, each with its own weights."""


class PassAware(OwnRules):
    """A layer that behaves differently in each pass; the code that runs a pass sets it.

    ``training`` keeps PyTorch's meaning: meta-training, or evaluation.
    """

    current_pass: Pass = "support"
    inner_step: int = 0
    """The inner step: of a support pass; of another pass, the one before it."""
    accumulates: bool = False
    """The layer's buffers change in the support passes and are read in the query pass."""
    reads_context: bool = False
    """The query pass reads buffers that a context pass has written."""
    outlives_episodes: bool = False
    """The moments stay from one meta-batch to the next; otherwise each episode resets them."""


StandIns = dict[int, Tensor]
"""By ``id`` of the tensor that it replaces: one tensor under many names stays one tensor."""


@contextmanager
def standing_in(modules: Sequence[nn.Module], stand_ins: StandIns) -> Iterator[None]:
    """Let ``modules``, all that the pass reaches, work on copies of their attributes in the block.

    ``stand_ins`` replace parameters and buffers; every other tensor is copied.

    ``torch.func.functional_call`` swaps tensors by name. It swaps a layer with two names twice, and
    afterwards that layer holds the tensors of the pass, not its parameters. Here each module gets
    another dictionary of attributes for the pass, and its own again afterwards, so whatever a pass
    assigns (a buffer, a flag, an attribute of any kind) is gone with it, after an error too.
    """
    before = [(module, vars(module)) for module in modules]
    stand_ins = dict(stand_ins)
    try:
        for module, attributes in before:
            new = {
                key: value if key in BOOKKEEPING else _copied(value, stand_ins)
                for key, value in attributes.items()
            }
            # past __setattr__, which a user's module may define
            object.__setattr__(module, "__dict__", new)
        yield
    finally:
        for module, attributes in before:
            object.__setattr__(module, "__dict__", attributes)


def _copied(value: Any, stand_ins: StandIns) -> Any:
    """Copy containers, replace tensors, and keep all else."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, Tensor):
        if id(value) not in stand_ins:
            stand_ins[id(value)] = value.clone()
        return stand_ins[id(value)]
    if isinstance(value, tuple | frozenset):
        items = [_copied(item, stand_ins) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return getattr(type(value), "_make", type(value))(items)  # _make: of a namedtuple
    if not isinstance(value, dict | list | set | deque):
        return value
    # copy.copy keeps a class that derives from these, and takes long
    new = dict(value) if type(value) is dict else copy.copy(value)
    if isinstance(new, dict):
        new.update({key: _copied(item, stand_ins) for key, item in new.items()})
    elif isinstance(new, list):
        new[:] = [_copied(item, stand_ins) for item in new]
    else:
        items = [_copied(item, stand_ins) for item in new]
        new.clear()
        new.update(items) if isinstance(new, set) else new.extend(items)
    return new


def module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module whose parameters have these dotted names."""
    root = nn.Module()
    for name, value in tensors.items():
        *parts, last = name.split(".")
        place = root
        for part in parts:  # not by add_module, which refuses names such as `type`
            place = place._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        place._parameters[last] = nn.Parameter(value)
    return root
