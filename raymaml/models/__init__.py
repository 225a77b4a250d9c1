"""Encoders, norms and heads: plain modules that know nothing of meta-learning."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.layers import LOCK
from raymaml.models.encoders import ConvNet4, ResNet12, ResNet18
from raymaml.models.heads import Classifier
from raymaml.models.libraries import library_encoder, library_names
from raymaml.models.policies import POLICIES, apply_policies

_BUILDERS: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "convnet4": ConvNet4,
    "convnet4_strided": partial(ConvNet4, strided=True),
    "resnet12": ResNet12,
    "resnet18": ResNet18,
    "resnet10": partial(ResNet18, blocks=1),
}
"""(channels of the images, widths) -> encoder."""


def build_model(
    model: ModelConfig,
    *,
    image_shape: tuple[int, int, int],
    num_ways: int,
    seed: int,
    num_steps: int = 1,
) -> Classifier:
    """Build the model with weights that depend on ``seed`` and the configuration alone.

    Args:
        model: its section of the configuration.
        image_shape: (C, H, W) of the images.
        num_ways: rows of the head (N); a shared head has one in any case.
        seed: seed of the initial weights.
        num_steps: inner steps of training (T), for norms that have something a step.

    Raises:
        UserError: the images are too small for the encoder, an own encoder cannot be imported or
            built or does not give ``[B, features]``, timm or torchvision is not installed or has
            no such encoder, or ``model.norm`` does not fit the layers.
    """
    classifier = plain_model(model, image_shape=image_shape, num_ways=num_ways, seed=seed)
    with LOCK:
        apply_policies(
            classifier,
            model.norm_by_pattern,
            eps=model.norm_eps,
            momentum=model.norm_momentum,
            num_steps=num_steps,
        )
    return classifier


def plain_model(
    model: ModelConfig, *, image_shape: tuple[int, int, int], num_ways: int, seed: int
) -> Classifier:
    """Build a model as ``build_model`` does, with the encoder's own norms.

    Raises:
        UserError: as ``build_model``, but for ``model.norm``.
    """
    check_image_size(model, image_shape)
    # an own encoder may draw its weights from torch's random numbers, which all threads share
    with LOCK, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _encoder(model, image_shape[0])
        classifier = Classifier(
            encoder,
            _count_features(encoder, model, image_shape),
            1 if model.head == "shared" else num_ways,
            temperature=model.temperature,
            learn_temperature=model.learn_temperature,
        )
        classifier.head_start = model.head
        drawn = classifier if model.encoder in ENCODERS else classifier.head
        _initialize(drawn, torch.Generator().manual_seed(seed))
    return classifier


def _encoder(model: ModelConfig, channels: int) -> nn.Module:
    if model.encoder in ENCODERS:
        return _BUILDERS[model.encoder](channels, model.stage_widths)
    return _own_encoder(model) if model.library is None else library_encoder(model, channels)


def list_encoders(library: str = "") -> list[str]:
    """Return the names for ``model.encoder``: of raymaml, or of ``timm`` or ``torchvision``.

    Raises:
        UserError: there is no such library, or it is not installed.
    """
    return library_names(library) if library else sorted(ENCODERS)


def list_norms() -> list[str]:
    """Return the policies of ``model.norm``, in the order of the table in README.md here."""
    return list(POLICIES)


def check_image_size(model: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    """Raise a ``UserError`` if images of shape (C, H, W) are too small for the encoder."""
    size = image_shape[1]
    halvings = ENCODERS.get(model.encoder, 0)
    if size >> halvings == 0:
        raise UserError(
            f"data.image_size is {size}, but model.encoder {model.encoder} halves it {halvings}"
            " times",
            remedy=f"use at least {2**halvings}",
        )


def _own_encoder(model: ModelConfig) -> nn.Module:
    """Import ``package.module:Name`` and call it with ``model.encoder_args``."""
    module_name, _, name = model.encoder.partition(":")
    try:
        encoder = getattr(importlib.import_module(module_name), name)(**model.encoder_args)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"model.encoder: {model.encoder} cannot be imported or built with model.encoder_args"
            f" {model.encoder_args} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise UserError(f"model.encoder: {model.encoder} gives {encoder!r}, not a torch.nn.Module")
    return encoder


def _count_features(encoder: nn.Module, model: ModelConfig, image_shape: Sequence[int]) -> int:
    """Count the features that an encoder gives, by a pass in evaluation mode."""
    training = encoder.training
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, *image_shape))
    except Exception as error:
        raise UserError(
            f"model.encoder: {model.encoder} fails on images of shape (C, H, W) ="
            f" {tuple(image_shape)} ({type(error).__name__}: {error})"
        ) from error
    encoder.train(training)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"model.encoder: {model.encoder} turns 2 images into {shape}",
            remedy="it must give features of shape [2, number of features]",
        )
    return features.shape[1]


def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw He-normal convolutions (He et al. 2015) and a small normal head; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
