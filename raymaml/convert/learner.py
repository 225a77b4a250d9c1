"""A meta-learner from the reference's settings and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymaml.common.errors import UserError, reason_of
from raymaml.config.model import InnerConfig, ModelConfig
from raymaml.convert.model import checked, inner_settings, merged, model_settings
from raymaml.convert.names import their_names
from raymaml.convert.reference import ReferenceLearner, follow_reference
from raymaml.convert.shape import require_form
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.training.tensor_file import is_plain, read_tensors

PARTS = {"encoder": "encoder_state_dict", "classifier": "classifier_state_dict"}


def from_reference(config: Mapping[str, Any], checkpoint: Path | None) -> MetaLearner:
    """Build the learner that the reference's settings, and its checkpoint if given, describe.

    Its gradients are the reference's, also where those are artefacts (see
    ``raymaml.convert.reference``); training with the converted settings uses the exact ones.

    Args:
        config: a training or test configuration of the reference, as its YAML gives it. What a
            test configuration does not say (encoder, head) comes from the checkpoint.
        checkpoint: a ``.pth`` of the reference, loaded weights-only; without one the weights are
            new ones.

    Raises:
        UserError: naming everything that has no counterpart here.
    """
    saved = load_reference(checkpoint) if checkpoint is not None else {}
    require_form(config, "the settings")
    config = merged(config, saved)
    settings, model, theirs = described_model(config)
    inner = checked(InnerConfig, inner_settings(config, theirs)[0])
    if saved:
        load_weights(model, saved, head_too=settings["head"] != "zero")
    follow_reference(model)
    return ReferenceLearner(model, inner, head=settings["head"])


def described_model(config: Mapping[str, Any]) -> tuple[dict[str, Any], nn.Module, dict[str, str]]:
    """Return our ``model`` section, the model, and the reference's name of each parameter.

    Raises:
        UserError: naming everything that has no counterpart.
    """
    settings = model_settings(config)
    section, size = checked(ModelConfig, settings), image_size(config)
    model = build_model(section, image_shape=(3, size, size), num_ways=_num_ways(config), seed=0)
    return settings, model, their_names(model, dict(model.named_parameters()))


def load_reference(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` of the reference, tensors and plain values only.

    Raises:
        UserError: the file cannot be read, holds more than that, or is of something else.
    """
    try:
        saved = read_tensors(path.read_bytes(), torch.device("cpu"))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise UserError(f"{path}: is not a checkpoint that can be read ({reason})") from None
    wanted = {"encoder", "encoder_args", "classifier", "classifier_args", *PARTS.values()}
    if not isinstance(saved, dict) or (missing := sorted(wanted - set(saved))):
        raise UserError(
            f"{path}: is not a checkpoint of the reference"
            + (f" (lacks {', '.join(missing)})" if isinstance(saved, dict) else "")
        )
    described = {key: saved[key] for key in wanted - set(PARTS.values())}
    require_form(described, path)
    if isinstance(saved.get("config"), dict):
        require_form(saved["config"], path)
    for key in PARTS.values():
        if not isinstance(saved[key], dict) or not all(map(is_plain, saved[key].values())):
            raise UserError(f"{path}: its {key} are not tensors by name")
    return dict(saved)


@torch.no_grad()
def load_weights(model: nn.Module, saved: Mapping[str, Any], *, head_too: bool = True) -> None:
    """Copy the weights, and the running moments that the model keeps, of the reference's state.

    ``head_too=False`` leaves the head alone, which starts at zero in each episode anyway.

    Raises:
        UserError: naming every tensor that is missing or of another shape.
    """
    theirs = {f"{part}.{k}": v for part, key in PARTS.items() for k, v in saved[key].items()}
    ours = model.state_dict()
    names = [name for name in ours if head_too or not name.startswith("head.")]
    problems = []
    for name, their_name in their_names(model, names).items():
        value = theirs.get(their_name)
        if value is None:
            problems.append(f"the checkpoint has no {their_name} (ours: {name})")
        elif value.shape != ours[name].shape or value.is_complex():
            problems.append(
                f"{their_name} has shape {list(value.shape)}, ours ({name})"
                f" {list(ours[name].shape)}"
            )
        else:
            ours[name].copy_(value)
    if problems:
        raise UserError(*problems)


def image_size(config: Mapping[str, Any]) -> int:
    """Return the size of the images; 84, which the reference's convnet4 is made for, if unsaid."""
    return int(_first(config, "image_size", 84))


def _num_ways(config: Mapping[str, Any]) -> int:
    """Return N; 5 if unsaid, as in the reference."""
    arguments = config.get("classifier_args") or {}
    return int(arguments.get("n_way", _first(config, "n_way", 5)))


def _first(config: Mapping[str, Any], key: str, default: int) -> Any:
    """Return what the configuration, or else the first of its sections that has it, says."""
    sections = (config[split] for split in ("train", "val", "test") if config.get(split))
    return next((section[key] for section in (config, *sections) if key in section), default)
