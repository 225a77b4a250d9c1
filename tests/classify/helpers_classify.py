"""A model with its initial weights, and images of a few classes: nothing is trained."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymaml.classify.classifier import FewShotClassifier
from raymaml.config.schema import Config
from raymaml.data.preprocessing import Preprocessing
from raymaml.training.state import build_learner
from raymaml.training.trained import TrainedModel
from tests.conftest import MakeConfig, tiny_classes

PREPROCESSING = Preprocessing(image_shape=(1, 16, 16), mean=(0.5,), std=(0.25,), fit="crop")
CPU = torch.device("cpu")


def trained_model(config: Config) -> TrainedModel:
    """Return the model of a config with its initial weights."""
    return TrainedModel(
        learner=build_learner(config, (1, 16, 16), config.episodes.test.num_ways, CPU),
        config=config,
        preprocessing=PREPROCESSING,
        train_classes=("train-0",),
        checkpoint="checkpoint_00000000",
        origin="0" * 64,
        encoder_source=None,
    )


def classifier(make_config: MakeConfig, *overrides: str, **params: Any) -> FewShotClassifier:
    """Return a classifier of an inductive model whose head starts at zero, unless overridden."""
    config = make_config("tiny", "model.norm=context", "model.head=zero", *overrides)
    return FewShotClassifier(trained_model(config), **params)


@cache
def pixels_of_class(number: int) -> NDArray[np.uint8]:
    """Return the 8 images, [8, 16, 16, 1], of a test class."""
    _, (found,) = tiny_classes()[17 + number]
    return found


def images(shots: tuple[int, ...], first: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """Return images of classes a, b, ..., so many of each, from the one numbered ``first`` on."""
    pixels = [pixels_of_class(way)[first : first + count] for way, count in enumerate(shots)]
    return np.concatenate(pixels), np.repeat(list("abcde")[: len(shots)], shots)
