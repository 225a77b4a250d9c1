"""A meta-learner from the reference's settings and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor, nn

from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.common.untrusted import checked
from raymaml.config.explain import validated
from raymaml.config.inner import InnerConfig
from raymaml.convert.reference import Model, Testing, kind_of, their_names
from raymaml.convert.settings import built_model, inner_settings
from raymaml.meta.learner import MetaLearner
from raymaml.training.tensor_file import is_plain, read_tensors

PARTS = {"encoder": "encoder_state_dict", "classifier": "classifier_state_dict"}

_PLAIN = TypeAdapter(dict[str, JsonValue] | None)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the reference."""

    model: Model
    config: Mapping[str, Any] | None
    """The training configuration, if it holds one."""
    weights: Mapping[str, Tensor]
    """Its state by name: ``encoder.encoder.conv1.conv.weight``, ..."""


def from_reference(config: Mapping[str, Any], checkpoint: Path | None) -> MetaLearner:
    """Build the learner that the reference's settings, and its checkpoint if given, describe.

    Args:
        config: a training or test configuration of the reference, as its YAML gives it. A
            checkpoint decides encoder and head, which a test configuration does not name.
        checkpoint: a ``.pth`` of the reference, loaded weights-only; None for new weights.

    Raises:
        UserError: naming everything that has no counterpart here.
    """
    saved = load_reference(checkpoint) if checkpoint is not None else None
    source = validated(kind_of(config), config, "the settings")
    data = source.test if isinstance(source, Testing) else source.train
    model = saved.model if saved else source
    if isinstance(model, Testing):
        problem = "a test configuration names no model"
        raise UserError(problem, remedy="give the checkpoint as well")
    network, theirs = built_model(model, source.inner_args, data)
    if saved is not None:
        load_weights(network, saved.weights, head_too=not source.inner_args.reset_classifier)
    inner, _ = inner_settings(source.inner_args, theirs)
    return MetaLearner(network, InnerConfig.model_validate(inner))


def load_reference(path: Path) -> Saved:
    """Read a ``.pth`` of the reference, tensors and plain values only.

    Raises:
        UserError: the file cannot be read, holds more than that, or is of something else.
    """
    try:
        saved = read_tensors(path.read_bytes(), torch.device("cpu"))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise UserError(f"{path}: is not a checkpoint that can be read ({reason})") from None
    wanted = {*Model.model_fields, *PARTS.values()}
    lacks = sorted(wanted - set(saved)) if isinstance(saved, dict) else ["everything"]
    if lacks:
        raise UserError(f"{path}: is not a checkpoint of the reference (lacks {', '.join(lacks)})")
    for key in PARTS.values():
        if not isinstance(saved[key], dict) or not all(map(is_plain, saved[key].values())):
            raise UserError(f"{path}: its {key} are not tensors by name")
    try:
        config = checked(_PLAIN, saved.get("config"))
        model = checked(_PLAIN, {key: saved[key] for key in Model.model_fields})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Saved(
        model=validated(Model, model or {}, str(path)),
        config=config,
        weights={f"{part}.{k}": v for part, key in PARTS.items() for k, v in saved[key].items()},
    )


@torch.no_grad()
def load_weights(model: nn.Module, theirs: Mapping[str, Tensor], *, head_too: bool) -> None:
    """Copy the weights, and the running moments that the model keeps, of the reference's state.

    ``head_too=False`` leaves the head alone, which starts at zero in each episode anyway.

    Raises:
        UserError: naming every tensor that is missing or of another shape.
    """
    ours = model.state_dict()
    names = [name for name in ours if head_too or not name.startswith("head.")]
    with gathered() as mistakes:
        for name, their_name in their_names(model, names).items():
            value, own = theirs.get(their_name), ours[name]
            if value is None:
                mistakes.add(f"the checkpoint has no {their_name} (ours: {name})")
            elif value.shape != own.shape or value.is_complex():
                mistakes.add(
                    f"{their_name} has shape {list(value.shape)}, ours ({name}) {list(own.shape)}"
                )
            else:
                own.copy_(value)
