"""Weights of others in a model: which of their names are which of ours.

Names in a file may have any prefix (``module.``, ``encoder.``, ``backbone.``). The one behind which
most names of the encoder stand counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError, gathered
from raymaml.layers import PassAware
from raymaml.models.libraries import NormAct
from raymaml.training.tensor_file import is_plain

_ENCODER = "encoder."
_MOMENTS = {"mean": "running_mean", "var": "running_var"}
"""Names of a policy's running moments -> those of ``nn.BatchNorm2d``."""
_OF_BATCH_NORM = set(_MOMENTS.values())
_REMEDY = "take the encoder, width and image channels that they were trained with"


class _Match(NamedTuple):
    tensors: Mapping[str, Tensor]
    """Of the file."""
    names: Mapping[str, str]
    """Names of the encoder's weights in the model -> in the file."""
    others: Mapping[str, str]
    """The same of head and temperature, which need not be there."""
    hits: int
    """Number of the encoder's names that the file has."""
    place: str
    """In the file."""


@torch.no_grad()
def copy_matching(model: nn.Module, content: object, where: str) -> str:
    """Copy the weights in a file into a ``Classifier``.

    A head of another shape, and what a norm policy has beyond scale and shift, may be missing.

    Args:
        model: changed in place, unless this raises.
        content: of the file: tensors by name, or a mapping that holds such mappings.
        where: the file, for messages.

    Returns:
        How many tensors were copied, and what is missing and left over.

    Raises:
        UserError: weights of the encoder are missing, have another shape, or are there twice.
    """
    own, found = model.state_dict(), _best_match(model, content, where)
    copied, lacking, misfits = dict[str, str](), list[str](), list[str]()
    for name, theirs in found.names.items():
        value = found.tensors.get(theirs)
        if value is None or value.is_floating_point() != own[name].is_floating_point():
            lacking.append(name)
        elif value.shape not in _fitting(model, name, own[name].shape):
            has, needs = list(value.shape), list(own[name].shape)
            misfits.append(f"{theirs} has {has}, the encoder needs {needs}")
        else:
            copied[name] = theirs
    missing = [found.names[name] for name in lacking if not _is_optional(model, name)]
    with gathered() as mistakes:
        if missing:
            mistakes.add(
                f"model.weights: {where} lacks {len(missing)} of the {len(found.names)} weights of"
                f" the encoder: {_listed(missing)}; it holds {_listed(found.tensors)}",
                _REMEDY,
            )
        if misfits:
            mistakes.add(
                f"model.weights: {where} has other shapes: {_listed(misfits, '; ')}", _REMEDY
            )
    for name, theirs in found.others.items():
        if theirs in found.tensors and found.tensors[theirs].shape == own[name].shape:
            copied[name] = theirs
    for name, theirs in copied.items():
        own[name].copy_(found.tensors[theirs])
    rest = [name for name in found.tensors if name not in copied.values()]
    left = [name for name in rest if _leaf(name) not in _OF_BATCH_NORM]
    parts = {
        f"{len(copied)} tensors": True,
        f"missing {_listed([found.names[name] for name in lacking])}": lacking,
        f"left over {_listed(left)}": left,
        "left over the running moments, which model.norm does not use": len(left) < len(rest),
    }
    return "; ".join(text for text, holds in parts.items() if holds)


def _best_match(model: nn.Module, content: object, where: str) -> _Match:
    """Find the mapping in a file, and the prefix, with most of the encoder's weights."""
    ours = [name for name in model.state_dict() if _leaf(name) != "num_batches_tracked"]
    encoder = [name for name in ours if name.startswith(_ENCODER)]
    plain = {name: name.removeprefix(_ENCODER) for name in encoder}
    spelled = {name: _spelled(model, name).removeprefix(_ENCODER) for name in encoder}
    others = [name for name in ours if name not in plain]
    schemes = [spelled] if plain == spelled else [spelled, plain]
    found = [each for names in schemes for each in _matches(content, names, others)]
    first = next((tensors for _, tensors in _states(content) if tensors), {})
    best = max(found, key=lambda match: match.hits, default=_Match(first, spelled, {}, 0, ""))
    equal = {match.place: match for match in found if match.hits == best.hits}
    if len(equal) > 1 and 2 * best.hits > len(encoder):
        raise UserError(
            f"model.weights: {where} holds the encoder {len(equal)} times: {_listed(equal)}",
            remedy="save one of them in a file of its own",
        )
    return best


def _matches(
    content: object, names: Mapping[str, str], others: Collection[str]
) -> Iterator[_Match]:
    """Yield the ways in which a file holds some of ``names``."""
    wanted = set(names.values())
    for key, tensors in _states(content):
        for prefix, count in _prefixes(tensors, wanted).items():
            above = prefix.removesuffix(_ENCODER)
            yield _Match(
                tensors,
                {name: prefix + theirs for name, theirs in names.items()},
                {name: above + name for name in others if above != prefix},
                count,
                f"{key} {prefix}*".strip(),
            )


def _states(content: object) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors by name at the top of a file and in each mapping there, with its key."""
    top = content if isinstance(content, Mapping) else {}
    for key, tree in [("", top), *top.items()]:
        if isinstance(tree, Mapping):
            yield (
                str(key),
                {
                    str(name): value
                    for name, value in tree.items()
                    if is_plain(value) and _leaf(str(name)) != "num_batches_tracked"
                },
            )


def _prefixes(tensors: Collection[str], wanted: Collection[str]) -> Counter[str]:
    """Count, for each prefix in a file, the wanted names that stand behind it."""
    found: Counter[str] = Counter()
    for name in tensors:
        places = [0, *(place + 1 for place, char in enumerate(name) if char == ".")]
        found.update(name[:place] for place in places if name[place:] in wanted)
    # of a run of raymaml: `rule.lr.encoder.conv1.conv.weight` is a learned rate
    return Counter({each: count for each, count in found.items() if each[:5] != "rule."})


def _spelled(model: nn.Module, name: str) -> str:
    """Return a name as the files of PyTorch, timm and torchvision spell it."""
    owner, _, leaf = name.rpartition(".")
    above = owner.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), PassAware):
        leaf = _MOMENTS.get(leaf, leaf)
    is_part = _leaf(owner) == "norm" and isinstance(model.get_submodule(above), NormAct)
    return f"{above if is_part else owner}.{leaf}"


def _fitting(model: nn.Module, name: str, shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes that fit; a norm with a row an inner step, [T, C], takes one for all."""
    owner = model.get_submodule(name.rpartition(".")[0])
    has_rows = isinstance(owner, PassAware) and len(shape) == 2
    return {shape, shape[1:], (1, *shape[1:])} if has_rows else {shape}


def _is_optional(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    is_norm = isinstance(model.get_submodule(owner), PassAware | nn.BatchNorm2d)
    return is_norm and leaf not in {"weight", "bias"}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: Collection[str], separator: str = ", ") -> str:
    """Return the first names, and how many follow."""
    some, more = separator.join(list(names)[:5]), len(names) - 5
    return (some or "nothing") + (f" and {more} more" if more > 0 else "")
