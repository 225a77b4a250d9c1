"""Whether tensors are an episode: its shapes, types and labels, all that is wrong at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from raymaml.common.errors import UserError

Made = TypeVar("Made")
_SETS = ("support", "query")
_NUMBERS = (torch.float32, torch.float64)


def unchecked(kind: type[Made], tensors: Mapping[str, Any]) -> Made:
    """Make an ``Episode`` or ``EpisodeBatch`` of tensors that are known to fit.

    A check reads labels, for which it waits until a GPU has them.
    """
    made = object.__new__(kind)
    vars(made).update(tensors)
    return made


def checked(
    tensors: Mapping[str, Any], *, batch: bool, num_ways: int | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an episode, or of a batch of them, with labels and rows as int64.

    Targets of floating point are no labels: they, and their inputs, are of any shape ``[n, ...]``.

    Raises:
        UserError: naming all that is wrong with them.
    """
    problems = [
        f"{name}: is of type {type(value).__name__}; give a torch.Tensor"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    problems = problems or _form_problems(tensors, batch)
    labelled = not problems and not tensors["support_y"].is_floating_point()
    problems = problems or _row_problems(tensors, batch)
    if labelled:
        problems = problems + _label_problems(tensors)
    if labelled and num_ways is not None and not problems:
        highest = int(tensors["support_y"].long().max())
        if num_ways != highest + 1:
            problems = [f"num_ways: is {num_ways}, and support_y has the labels 0 to {highest}"]
    if problems:
        kind = "EpisodeBatch" if batch else "Episode"
        raise UserError(*(f"{kind}.{problem}" for problem in problems))
    whole = {"support_y", "query_y"} if labelled else set()
    whole.add("support_batches")
    return {name: y.long() if name in whole else y for name, y in tensors.items()}


def _form_problems(tensors: Mapping[str, Tensor], batch: bool) -> list[str]:
    """Return the problems of types, shapes and devices."""
    problems = [problem for name in _SETS for problem in _set_problems(tensors, name, batch)]
    a, b, first = tensors["support_x"], tensors["query_x"], 1 + batch
    things, _, fits = _kind(tensors, batch)
    if fits(a) and fits(b):
        if batch and len(a) != len(b):
            problems.append(f"query_x: holds {len(b)} episodes, support_x {len(a)}; give as many")
        if a.shape[first:] != b.shape[first:]:
            problems.append(
                f"query_x: has {things} of shape {list(b.shape[first:])}, support_x of"
                f" {list(a.shape[first:])}; give one shape"
            )
    if a.dtype != b.dtype:
        problems.append(f"query_x: holds {b.dtype}, support_x {a.dtype}; give one type")
    problems += _batch_problems(tensors, batch)
    devices = {name: str(value.device) for name, value in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        problems.append(f"support_x: lies on another device than the rest ({places}); give one")
    return problems


def _kind(tensors: Mapping[str, Tensor], batch: bool) -> tuple[str, str, Callable[[Tensor], bool]]:
    """Return the word for the inputs, their axes, and whether an input has as many."""
    first, episodes = 1 + batch, "E, " * batch
    if tensors["support_y"].is_floating_point():
        return "inputs", f"{episodes}n, ...", lambda x: x.dim() >= first
    return "images", f"{episodes}n, C, H, W", lambda x: x.dim() == first + 3


def _set_problems(tensors: Mapping[str, Tensor], name: str, batch: bool) -> Iterator[str]:
    """Yield the problems of the inputs and targets of one set, ``support`` or ``query``."""
    x, y, first = tensors[f"{name}_x"], tensors[f"{name}_y"], 1 + batch
    things, axes, fits = _kind(tensors, batch)
    labelled = things == "images"
    if x.dtype not in _NUMBERS:
        remedy = (
            "half_precision of MetaLearner computes in bfloat16; give x.float()"
            if x.is_floating_point()
            else "give x.float() / 255, normalised as in training"
        )
        yield f"{name}_x: holds {x.dtype}; {things} are float32 or float64: {remedy}"
    if y.is_complex() or y.dtype == torch.bool or y.is_floating_point() == labelled:
        yield (
            f"{name}_y: holds {y.dtype}; targets are labels, whole numbers 0 to N-1, or floating"
            " point in both sets"
        )
    elif not labelled and y.dtype != x.dtype and x.dtype in _NUMBERS:
        yield f"{name}_y: holds {y.dtype}, {name}_x {x.dtype}; give one type"
    if not fits(x):
        yield f"{name}_x: is of shape {list(x.shape)}; {things} are [{axes}]"
    elif (y.shape if labelled else y.shape[:first]) != x.shape[:first]:
        wanted = ", ".join(map(str, x.shape[:first])) + ", ..." * (not labelled)
        yield (
            f"{name}_y: is of shape {list(y.shape)}; the {things} of {name}_x need targets of shape"
            f" [{wanted}]"
        )
    elif x.shape[:first].numel() == 0:
        yield f"{name}_x: holds no {things[:-1]} ({list(x.shape)}); give at least one"


def _batch_problems(tensors: Mapping[str, Tensor], batch: bool) -> Iterator[str]:
    """Yield the problems of the support rows of each inner step, if there are any."""
    rows, x = tensors.get("support_batches"), tensors["support_x"]
    if rows is None:
        return
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        yield f"support_batches: holds {rows.dtype}; give row numbers of support_x, whole numbers"
    if rows.dim() != 2 + batch or rows.shape[-1] == 0 or (batch and len(rows) != len(x)):
        axes = "E, T, B" if batch else "T, B"
        yield (
            f"support_batches: is of shape {list(rows.shape)}; they are the support rows of each"
            f" inner step, [{axes}]"
        )


def _row_problems(tensors: Mapping[str, Tensor], batch: bool) -> list[str]:
    """Return the problem of row numbers whose shape and type fit, if they are out of range."""
    rows, count = tensors.get("support_batches"), tensors["support_x"].shape[batch]
    if rows is None or bool(((rows.long() >= 0) & (rows.long() < count)).all()):
        return []
    return [
        f"support_batches: holds rows from {int(rows.long().min())} to {int(rows.long().max())};"
        f" support_x has the rows 0 to {count - 1}"
    ]


def _label_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the problems of labels whose shapes and types fit."""
    labels = {name: tensors[f"{name}_y"].long() for name in _SETS}
    problems = [
        f"{name}_y: holds the label {int(y.min())}; labels are 0 to N-1, and none is left out of"
        " the loss"
        for name, y in labels.items()
        if int(y.min()) < 0
    ]
    if problems:
        return problems
    support, query = (y.reshape(-1, y.shape[-1]) for y in labels.values())  # [E, n], or [1, n]
    ways = int(support.max()) + 1
    # compared, not counted: a label of 10^9 would make as many counters
    if ways > support.shape[1]:
        present = [str(label) for label in support.unique().tolist()]
        return [
            f"support_y: holds the labels {', '.join(present[:5])}{', ...' * (len(present) > 5)} on"
            f" {support.shape[1]} images an episode; labels are 0 to N-1, each with a support image"
        ]
    seen = torch.zeros(len(support), ways, dtype=torch.bool, device=support.device)
    seen.scatter_(1, support, True)
    for episode, label in (~seen).nonzero().tolist()[:1]:
        where = f" of episode {episode}" if len(support) > 1 else ""
        problems.append(
            f"support_y: label {label}{where} has no support image; labels are 0 to {ways - 1},"
            " each with a support image, the same number N of them in each episode"
        )
    if int(query.max()) >= ways:
        problems.append(
            f"query_y: holds the label {int(query.max())}; the support set has the labels 0 to"
            f" {ways - 1}"
        )
    return problems
