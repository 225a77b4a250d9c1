"""Tensors that stand in for those of a model during a pass; the model itself is not changed.

``torch.func.functional_call`` exchanges tensors by name. It exchanges a layer with two names twice,
and puts the tensors of the pass back in the place of the parameters. Here each module is given
another dictionary of attributes for the pass, and its own again afterwards. So whatever a pass
assigns (a buffer, a flag, an attribute of any kind) is gone with that dictionary, after an error
too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""Hooks and flags of every module: a pass leaves them alone, and to copy them takes long."""
_ATOMS = {bool, int, float, str, type(None)}

StandIns = dict[int, Tensor]
"""By ``id`` of the tensor that it stands in for: one tensor under many names stays one tensor."""


def reachable_modules(model: nn.Module) -> list[nn.Module]:
    """Return each module once: submodules, and modules in plain attributes and containers."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(_modules_in(vars(module)))
    return list(found.values())


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _modules_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item)


@contextmanager
def standing_in(modules: Sequence[nn.Module], stand_ins: StandIns) -> Iterator[None]:
    """Let ``modules`` work on copies of their attributes during the block.

    Args:
        modules: all that the pass reaches.
        stand_ins: what replaces parameters and buffers; every other tensor is copied.
    """
    before = [(module, vars(module)) for module in modules]
    stand_ins = dict(stand_ins)
    try:
        for module, attributes in before:
            # past __setattr__, which a user's module may have made its own
            object.__setattr__(module, "__dict__", _copied_attributes(attributes, stand_ins))
        yield
    finally:
        for module, attributes in before:
            object.__setattr__(module, "__dict__", attributes)


def _copied_attributes(attributes: dict[str, Any], stand_ins: StandIns) -> dict[str, Any]:
    return {
        key: value if key in _BOOKKEEPING else _copied(value, stand_ins)
        for key, value in attributes.items()
    }


def _copied(value: Any, stand_ins: StandIns) -> Any:
    """Copy containers, replace tensors, and keep all else."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        if id(value) not in stand_ins:
            stand_ins[id(value)] = value.clone()
        return stand_ins[id(value)]
    if type(value) is tuple:
        return tuple(_copied(item, stand_ins) for item in value)
    if not isinstance(value, dict | list | set):
        return value
    new = copy.copy(value)  # also of classes of one's own
    if isinstance(new, dict):
        new.update({key: _copied(item, stand_ins) for key, item in new.items()})
    elif isinstance(new, list):
        new[:] = [_copied(item, stand_ins) for item in new]
    return new
