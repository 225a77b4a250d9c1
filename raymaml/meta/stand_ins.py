"""Tensors that stand in for those of a model during a pass; the model itself is not changed.

``torch.func.functional_call`` exchanges tensors by name. It exchanges a layer with two names twice,
and puts the tensors of the pass back in the place of the parameters. Here each module is given
another dictionary of attributes for the pass, and its own again afterwards. So whatever a pass
assigns (a buffer, a flag, an attribute of any kind) is gone with that dictionary, after an error
too.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from logging import Logger
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from raymaml.layers import CONTAINERS, reachable_modules

_BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""Hooks and flags of every module: a pass leaves them alone, and to copy them takes long."""
_ATOMS = {bool, int, float, str, type(None)}

StandIns = dict[int, Tensor]
"""By ``id`` of the tensor that it stands in for: one tensor under many names stays one tensor."""


def out_of_reach(model: nn.Module) -> list[str]:
    """Name the attributes that lead, by an object that a pass does not look into, to weights.

    These are parameters and buffers of the model, and modules that it holds nowhere else: a pass
    puts its tensors in the place of neither.
    """
    modules = reachable_modules(model)
    known = set(map(id, modules.values()))
    tensors = {id(value) for value in (*model.parameters(), *model.buffers())}
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in modules.items()
        for key, value in vars(module).items()
        if key not in _BOOKKEEPING and _leads_out(value, known, tensors)
    ]


def _leads_out(value: Any, modules: Set[int], tensors: Set[int]) -> bool:
    waiting, seen = [(value, False)], set()  # with whether it lies in an object
    while waiting:
        each, within = waiting.pop()
        if type(each) in _ATOMS or (id(each), within) in seen:
            continue
        seen.add((id(each), within))
        if isinstance(each, nn.Module):
            if id(each) not in modules:
                return True
        elif isinstance(each, Tensor):
            if within and id(each) in tensors:
                return True
        elif isinstance(each, dict):
            waiting += [(item, within) for item in each.values()]
        elif isinstance(each, CONTAINERS):
            waiting += [(item, within) for item in each]
        else:
            waiting += [(item, True) for item in _contents(each)]
    return False


def _contents(value: Any) -> list[Any]:
    """Return what an object or function holds, as far as Python code can be seen to hold it."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, type | ModuleType | Logger):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that was never assigned
        return False


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
    if isinstance(value, tuple | frozenset):
        items = [_copied(item, stand_ins) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return getattr(type(value), "_make", type(value))(items)  # the former of a namedtuple
    if not isinstance(value, dict | list | set | deque):
        return value
    new = copy.copy(value)  # also of classes of one's own
    if isinstance(new, dict):
        new.update({key: _copied(item, stand_ins) for key, item in new.items()})
    elif isinstance(new, list):
        new[:] = [_copied(item, stand_ins) for item in new]
    else:
        items = [_copied(item, stand_ins) for item in new]
        new.clear()
        new.update(items) if isinstance(new, set) else new.extend(items)
    return new
