"""Whether tensors are an episode: its shapes, types and labels, all that is wrong at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from raymaml.common.errors import UserError

Made = TypeVar("Made")
_SETS = ("support", "query")


def unchecked(kind: type[Made], tensors: Mapping[str, Any]) -> Made:
    """Make an ``Episode`` or ``EpisodeBatch`` of tensors that are known to fit.

    A check reads labels, for which it waits until a GPU has them.
    """
    made = object.__new__(kind)
    vars(made).update(tensors)
    return made


def checked(tensors: Mapping[str, Any], *, batch: bool) -> dict[str, Tensor]:
    """Return the tensors of an episode, or of a batch of them, with labels as int64.

    Raises:
        UserError: naming all that is wrong with them.
    """
    problems = [
        f"{name}: is of type {type(value).__name__}; give a torch.Tensor"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    problems = problems or _form_problems(tensors, batch) or _label_problems(tensors)
    if problems:
        kind = "EpisodeBatch" if batch else "Episode"
        raise UserError(*(f"{kind}.{problem}" for problem in problems))
    return {name: y.long() if name.endswith("_y") else y for name, y in tensors.items()}


def _form_problems(tensors: Mapping[str, Tensor], batch: bool) -> list[str]:
    """Return the problems of types, shapes and devices."""
    axes = "E, n, C, H, W" if batch else "n, C, H, W"
    dims, problems = 4 + batch, []
    for name in _SETS:
        x, y = tensors[f"{name}_x"], tensors[f"{name}_y"]
        if x.dtype not in (torch.float32, torch.float64):
            remedy = (
                "half_precision of MetaLearner computes in bfloat16; give x.float()"
                if x.is_floating_point()
                else "give x.float() / 255, normalised as in training"
            )
            problems.append(f"{name}_x: holds {x.dtype}; images are float32 or float64: {remedy}")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            problems.append(f"{name}_y: holds {y.dtype}; labels are whole numbers 0 to N-1")
        if x.dim() != dims:
            problems.append(f"{name}_x: is of shape {list(x.shape)}; images are [{axes}]")
        elif y.shape != x.shape[: dims - 3]:
            problems.append(
                f"{name}_y: is of shape {list(y.shape)}; the images of {name}_x need labels of"
                f" shape {list(x.shape[: dims - 3])}"
            )
        elif y.numel() == 0:
            problems.append(f"{name}_x: holds no image ({list(x.shape)}); give at least one")
    a, b = tensors["support_x"], tensors["query_x"]
    if a.dim() == b.dim() == dims:
        if batch and len(a) != len(b):
            problems.append(f"query_x: holds {len(b)} episodes, support_x {len(a)}; give as many")
        if a.shape[-3:] != b.shape[-3:]:
            problems.append(
                f"query_x: has images of shape {list(b.shape[-3:])}, support_x of"
                f" {list(a.shape[-3:])}; give one shape"
            )
    if a.dtype != b.dtype:
        problems.append(f"query_x: holds {b.dtype}, support_x {a.dtype}; give one type")
    devices = {name: str(value.device) for name, value in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        problems.append(f"support_x: lies on another device than the rest ({places}); give one")
    return problems


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
