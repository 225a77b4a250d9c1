"""Encoders, norms and heads: plain modules that know nothing of meta-learning."""

from __future__ import annotations

import torch
from torch import nn

from raymaml.config.schema import ModelConfig
from raymaml.models.convnet4 import NUM_BLOCKS, ConvNet4
from raymaml.models.heads import Classifier
from raymaml.types import UserError


def build_model(
    model: ModelConfig, *, image_shape: tuple[int, int, int], num_ways: int, seed: int
) -> Classifier:
    """Build the model with weights that depend on ``seed`` and the configuration alone.

    Args:
        model: its section of the configuration.
        image_shape: (C, H, W) of the images.
        num_ways: rows of the head (N).
        seed: seed of the initial weights.

    Raises:
        UserError: the images are too small for the encoder.
    """
    check_image_size(model, image_shape)
    channels, size, _ = image_shape
    encoder = ConvNet4(channels, size, model.width)
    classifier = Classifier(encoder, encoder.out_features, num_ways)
    _initialize(classifier, torch.Generator().manual_seed(seed))
    return classifier


def check_image_size(model: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    """Check that images of ``image_shape`` (C, H, W) are large enough for the encoder.

    Raises:
        UserError: they are not.
    """
    size = image_shape[1]
    if size >> NUM_BLOCKS == 0:
        raise UserError(
            f"data.image_size is {size}, but model.encoder {model.encoder} halves it {NUM_BLOCKS}"
            f" times; use at least {2**NUM_BLOCKS}"
        )


def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """He-normal convolutions (He et al. 2015), small normal head, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
