"""The weights that a run starts from: ``model.weights``, which others have trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from raymaml.common.errors import UserError, reason_of
from raymaml.config.explain import validated
from raymaml.config.model import PRETRAIN, PRETRAINED, ModelConfig
from raymaml.config.schema import Config
from raymaml.data.bank_format import ImageShape
from raymaml.layers import LOCK
from raymaml.models import plain_model
from raymaml.models.libraries import library_encoder
from raymaml.models.policies import apply_policies
from raymaml.storage.files import exists, read_bytes
from raymaml.storage.place import Place, to_place
from raymaml.training.checkpoint import (
    CARD,
    find_checkpoint,
    list_steps,
    read_card,
    saved_step,
    weights_of,
)
from raymaml.training.identity import read_run_file
from raymaml.training.matching import copy_matching
from raymaml.training.tensor_file import read_tensors, read_weights
from raymaml.types import Params

_CPU = torch.device("cpu")


class Start(NamedTuple):
    """The weights that a model was given at its start."""

    hash: str | None = None
    """SHA-256 of the file, or of the tensors that a library downloads; None: of the seed alone."""
    text: str = ""
    """A sentence on them, for the user."""


@dataclass(frozen=True)
class _Source:
    place: str
    hash: str
    load: Callable[[], Any]


def start_from_weights(config: Config, network: nn.Module, image_shape: ImageShape) -> Start:
    """Copy ``model.weights`` into a network that ``build_model`` has built, if it names any.

    Raises:
        UserError: they cannot be read, are not those that the run was started from, or do not fit:
            weights of the encoder are missing, or of another shape.
    """
    if config.model.weights is None:
        return Start()
    source = _source(_start(config), image_shape)
    _require_same(config, source)
    text = copy_matching(network, source.load(), source.place)
    return Start(source.hash, f"starts from {source.place} (sha256 {source.hash[:12]}): {text}")


def weights_hash(config: Config, image_shape: ImageShape) -> str | None:
    """Return the hash of the ``model.weights`` of a run; they are not loaded.

    Of a run that was started, weights that are away have the hash that it was started with.

    Raises:
        UserError: they are not those that the run was started from, or no run was started from them
            and they cannot be read.
    """
    if config.model.weights is None:
        return None
    started = _hash_of_run(config)
    if started is not None and config.model.weights == PRETRAINED:
        return started
    try:
        source = _source(_start(config), image_shape)
    except UserError:
        if started is None:
            raise
        return started
    _require_same(config, source)
    return source.hash


def create_encoder(
    name: str,
    *,
    image_shape: tuple[int, int, int] = (3, 84, 84),
    norm: str | Mapping[str, str] | None = None,
    weights: str | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Return an encoder: images ``[B, C, H, W]`` -> features ``[B, num_features]``.

    Its attribute ``num_features`` says how long a feature vector is.

    Args:
        name: as ``model.encoder``; ``list_encoders`` has the names.
        image_shape: (C, H, W) of the images.
        norm: policy, or policies by name pattern; None leaves ``nn.BatchNorm2d`` as it is.
        weights: as ``model.weights``; None: random ones.
        seed: of the random weights.
        options: others of ``model``: ``width``, ``encoder_args``, ``norm_eps``, ``norm_momentum``.

    Raises:
        UserError: there is no such encoder or option, or the weights or the norm do not fit.
    """
    tree = {"encoder": name, "weights": weights, **options}
    if strange := options.keys() - {"width", "encoder_args", "norm_eps", "norm_momentum"}:
        raise UserError(f"create_encoder: has no option {', '.join(sorted(strange))}")
    model = validated(ModelConfig, tree, "create_encoder")
    network = plain_model(model, image_shape=image_shape, num_ways=1, seed=seed)
    if model.weights is not None:
        source = _source(model, image_shape)
        copy_matching(network, source.load(), source.place)
    if norm is not None:
        policies = {"*": norm} if isinstance(norm, str) else norm
        apply_policies(network, policies, eps=model.norm_eps, momentum=model.norm_momentum)
    encoder = network.encoder
    vars(encoder)["num_features"] = network.head.in_features  # a number: no part of the module
    return encoder


def _start(config: Config) -> ModelConfig:
    """Return ``model`` with the run folder that ``model.weights: pretrain`` stands for.

    Raises:
        UserError: the pretraining is not finished.
    """
    *before, last = config.stages
    for run in before:
        step, steps = saved_step(run.run_folder), run.steps.num_steps
        if step < steps:
            state = f"stands before step {step} of {steps}" if step >= 0 else "holds no checkpoint"
            raise UserError(
                f"model.weights is pretrain, but {run.run_folder} {state}",
                remedy="run `raymaml pretrain CONFIG` first",
            )
        return last.model.model_copy(update={"weights": str(run.run_folder)})
    return last.model


def _hash_of_run(config: Config) -> str | None:
    run = read_run_file(config.run_folder)
    found: str | None = None if run is None else run.facts.get("weights_hash")
    return found


def _require_same(config: Config, source: _Source) -> None:
    started = _hash_of_run(config)
    if started not in (None, source.hash):
        raise UserError(
            f"{config.run_folder}: was started from other model.weights (sha256 {started[:12]})"
            f" than {source.place} now holds ({source.hash[:12]})",
            remedy="put the old ones back, or choose another name",
        )


def _source(model: ModelConfig, image_shape: ImageShape) -> _Source:
    """Find the weights, and hash them."""
    text = str(model.weights)
    if text == PRETRAINED:
        with LOCK, torch.random.fork_rng(devices=[]):
            state = library_encoder(model, image_shape[0], pretrained=True).state_dict()
        digest = hashlib.sha256()
        for name, value in state.items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return _Source(f"{PRETRAINED} {model.encoder}", digest.hexdigest(), lambda: state)
    try:
        place = to_place(text)
    except ValueError as error:
        raise UserError(f"model.weights is {text!r}; it {error}") from None
    if exists(place / CARD) or list_steps(place):
        path = place if exists(place / CARD) else find_checkpoint(place, "best")
        card = read_card(path)
        stage = str(card.config.get("stage"))
        return _Source(str(path), card.files[card.weights], partial(_of_run, path, stage))
    content = _content(place)
    return _Source(text, hashlib.sha256(content).hexdigest(), partial(_tensors, text, content))


def _of_run(path: Place, stage: str) -> Params:
    """Load a checkpoint; the head of a pretraining gets a name by which it is left over."""
    weights = weights_of(path, _CPU)
    if stage != PRETRAIN:
        return weights
    return {f"{stage}.{n}" if n.startswith("head.") else n: each for n, each in weights.items()}


def _content(place: Place) -> bytes:
    try:
        return read_bytes(place)
    except OSError as error:
        is_folder = isinstance(error, IsADirectoryError)
        problem = "it is a folder without a checkpoint" if is_folder else error.strerror
        raise UserError(
            f"model.weights: {place} cannot be read ({problem})",
            remedy="give a safetensors file, a torch state dict, or a run folder of raymaml (of"
            " `raymaml train` or `raymaml pretrain`)",
        ) from None


def _tensors(where: str, content: bytes) -> Any:
    """Return what a safetensors file or one of ``torch.save`` holds."""
    try:
        if content[8:9] == b"{":  # behind the length of a safetensors header
            return read_weights(content, _CPU)
        return read_tensors(content, _CPU)
    except ValueError as error:
        raise UserError(
            f"model.weights: {where} is no safetensors file and no torch state dict"
            f" ({reason_of(error)})"
        ) from None
