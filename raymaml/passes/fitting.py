"""Whether episodes can start at a model, and adapt and learn all that it holds."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from logging import Logger
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from raymaml.common.errors import UserError
from raymaml.config.inner import BY_THE_END, OVER_THE_RATE, InnerConfig
from raymaml.layers import ATOMS, BOOKKEEPING, CONTAINERS, reachable_modules, tracking_norms
from raymaml.types import Episode, EpisodeBatch, Params, tensors_of

HeadStart = Literal["learned", "zero", "shared", "prototypes"]
"""``model.head``: where the head starts in each episode."""


@dataclass(frozen=True)
class Head:
    """The head of a model: the name of the module, and where it starts in each episode."""

    name: str
    start: HeadStart

    @property
    def has_own_rows(self) -> bool:
        """Whether it has a learned row for each way, or one for all; else nothing in it is
        learned."""
        return self.start in {"learned", "shared"}

    def holds(self, parameter: str) -> bool:
        """Return whether the parameter of this name belongs to the head, not to the encoder."""
        return parameter.startswith(f"{self.name}.")


def require_fitting(model: nn.Module, head: Head) -> None:
    """Check that episodes can start at the model.

    Raises:
        UserError: parameters have no shape yet, a part is TorchScript, a norm keeps moments from
            episode to episode, a tensor was made in inference mode or lies where no pass reaches
            it, the head's parameters are elsewhere in the model too, there is no head, or a shared
            head has not one row.
    """
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    _refuse(
        [name for name, value in params.items() if is_lazy(value)],
        "have no shape before the first pass",
        "call the model once on images",
    )
    _refuse(
        [name for name, value in (params | buffers).items() if value.is_inference()],
        "were made in torch.inference_mode, and PyTorch keeps such tensors out of gradients",
        "build the model outside of it",
    )
    _refuse(
        [n for n, each in model.named_modules() if isinstance(each, torch.jit.ScriptModule)],
        "is TorchScript, which takes no weights but its own, so that it would neither adapt nor"
        " learn",
        "give the nn.Module that it was made of",
    )
    _refuse(
        tracking_norms(model),
        "keep moments from episode to episode",
        "raymaml.apply_policies gives them a norm policy",
    )
    _refuse(
        _out_of_reach(model),
        "hold modules, parameters or buffers in an object, where they would neither adapt nor"
        " learn",
        "hold modules as submodules, and tensors in modules",
    )
    _require_head(model, head)


def require_reach(inner: InnerConfig, head: Head, still: Sequence[str], *, learns: bool) -> None:
    """Check that a method of the meta-gradient reaches all that is to be learned.

    Args:
        inner: names the method.
        head: where it starts.
        still: names of meta-parameters that do not adapt.
        learns: whether the rule learns.

    Raises:
        UserError: it does not.
    """
    method = inner.gradient
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name in still)
    still = [*modules, *(["prototypes"] if head.start == "prototypes" else [])]
    if method in OVER_THE_RATE and still:
        raise UserError(
            f"inner.gradient is {method}, which learns only parameters that adapt, and not"
            f" {', '.join(still)}",
            remedy="take first_order, which is close to it, or let all adapt",
        )
    if method in BY_THE_END and learns:
        raise UserError(
            f"inner.gradient is {method}, which looks at the adapted weights alone, and inner.rule"
            f" {inner.rule} learns",
            remedy="take another method, or another rule",
        )


def _refuse(names: Sequence[str], problem: str, remedy: str) -> None:
    if names:
        raise UserError(f"model: {', '.join(names)} {problem}", remedy=remedy)


def _require_head(model: nn.Module, head: Head) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    held = {id(value) for name, value in named.items() if head.holds(name)}
    elsewhere = [n for n, value in named.items() if not head.holds(n) and id(value) in held]
    if elsewhere:
        raise UserError(
            f"head: its parameters are {', '.join(elsewhere)} too, so that it cannot start or"
            " learn apart from the encoder",
            remedy="give the model a head that is nowhere else in it",
        )
    weight = f"{head.name}.weight"
    if weight not in named:
        linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        found = f"its linear layers are {', '.join(linear)}" if linear else "it has no linear layer"
        raise UserError(
            f"model: has no linear layer named {head.name} ({found})",
            remedy="give the name of its last layer by head=, or name that so: self.head ="
            " nn.Linear(features, num_ways)",
        )
    rows = len(named[weight])
    if head.start == "shared" and rows != 1:
        raise UserError(
            f"head: is shared, and {weight} has {rows} rows", remedy="a shared head has one"
        )
    if head.start == "prototypes" and f"{head.name}.bias" not in named:
        raise UserError(
            f"head: starts at prototypes, and {head.name} has no bias", remedy="give it one"
        )


def _out_of_reach(model: nn.Module) -> list[str]:
    """Name the attributes that lead to weights by an object that a pass does not look into.

    A pass replaces neither the model's tensors in there, nor modules that are held nowhere else.
    """
    modules = reachable_modules(model)
    known = set(map(id, modules.values()))
    tensors = {id(value) for value in (*model.parameters(), *model.buffers())}
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in modules.items()
        for key, value in vars(module).items()
        if key not in BOOKKEEPING and _leads_out(value, known, tensors)
    ]


def _leads_out(value: Any, modules: Set[int], tensors: Set[int]) -> bool:
    waiting, seen = [(value, False)], set()  # with whether it lies in an object
    while waiting:
        each, within = waiting.pop()
        if type(each) in ATOMS or (id(each), within) in seen:
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
    """Return the values inside an object or function, as far as Python code can see them."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        filled = [cell for cell in value.__closure__ or () if cell != CellType()]
        held = [cell.cell_contents for cell in filled]
        return [*held, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, type | ModuleType | Logger):
        return []
    return list(getattr(value, "__dict__", {}).values())


def require_gradients(episode: Episode | EpisodeBatch) -> None:
    """Raise a ``UserError`` where gradients cannot be computed for an episode."""
    if torch.is_inference_mode_enabled():
        raise UserError(
            "torch.inference_mode: an episode is adapted by gradients, which do not exist in it",
            remedy="call outside of it, or use torch.no_grad()",
        )
    for name, value in tensors_of(episode).items():
        if value.is_inference():
            raise UserError(
                f"{name}: was made in torch.inference_mode, and PyTorch keeps such a tensor out of"
                " gradients",
                remedy=f"make it outside, or give {name}.clone()",
            )


def require_rows(model: nn.Module, head: Head, episode: Episode | EpisodeBatch) -> None:
    """Raise a ``UserError`` if a learned head has not a row for each class."""
    labels = episode.support_y
    # Only where it costs nothing: each step of training would wait for a GPU.
    if head.start != "learned" or labels.device.type != "cpu" or isinstance(labels, FakeTensor):
        return
    rows = len(model.get_parameter(f"{head.name}.weight"))
    ways = num_ways(episode, rows)
    if ways != rows:
        raise UserError(
            f"{head.name}: has {rows} rows and the episode {ways} classes",
            remedy=f"build the model with num_ways={ways}, or give a head that starts at zero or"
            " is shared",
        )


def num_ways(episode: Episode | EpisodeBatch, rows: int) -> int:
    """Return the number of classes; targets that are no labels leave the head its rows."""
    labels = episode.support_y
    if labels.is_floating_point():
        return rows
    return int(labels.max()) + 1 if episode.num_ways is None else episode.num_ways


def adaptation_table(model: nn.Module, frozen: Set[str], learned: Params) -> str:
    """Lay out, a line a module, how many parameters it has and whether they adapt; and how many
    numbers the inner rule learns, by the first part of their names."""
    counts: dict[tuple[str, bool], int] = {}
    for name, value in model.named_parameters():
        row = (name.rpartition(".")[0] or name, name not in frozen)
        counts[row] = counts.get(row, 0) + value.numel()
    lines = [
        f"  {module:<32} {count:>12,}  {'adapts' if adapts else 'frozen'}"
        for (module, adapts), count in counts.items()
    ]
    rule: dict[str, int] = {}
    for name, tensor in learned.items():
        kind = f"rule.{name.partition('.')[0]}"
        rule[kind] = rule.get(kind, 0) + tensor.numel()
    lines += [f"  {kind:<32} {count:>12,}  learned" for kind, count in rule.items()]
    adapted = sum(count for (_, adapts), count in counts.items() if adapts)
    return "\n".join([*lines, f"  {'in all':<32} {sum(counts.values()):>12,}  {adapted:,} adapt"])
