"""Configurations and a checkpoint of the reference, as it writes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from raymaml.convert import from_reference
from raymaml.convert.reference import their_names

BLOCKS = ["conv1", "conv2", "conv3", "conv4"]
SECTION = {
    "split": "meta-train",
    "image_size": 84,
    "normalization": True,
    "transform": "flip",
    "n_batch": 200,
    "n_episode": 4,
    "n_way": 5,
    "n_shot": 1,
    "n_query": 15,
}
TRAIN: dict[str, Any] = {
    "dataset": "meta-mini-imagenet",
    "train": SECTION,
    "val": {**SECTION, "split": "meta-val"},
    "encoder": "convnet4",
    "encoder_args": {"bn_args": {"track_running_stats": True, "episodic": BLOCKS}},
    "classifier": "logistic",
    "classifier_args": {"temp": 1.0},
    "inner_args": {
        "reset_classifier": True,
        "n_step": 5,
        "encoder_lr": 0.01,
        "classifier_lr": 0.02,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
    "optimizer": "sgd",
    "optimizer_args": {
        "lr": 0.01,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": [120, 140],
    },
    "epoch": 150,
}
TEST: dict[str, Any] = {
    "dataset": "meta-mini-imagenet",
    "test": {**SECTION, "split": "meta-test", "n_query": 1, "transform": None},
    "load": "./save/x/max-va.pth",
    "inner_args": {"reset_classifier": True, "n_step": 10, "momentum": 0.9},
    "epoch": 10,
}


def saved(config: dict[str, Any] = TRAIN) -> dict[str, Any]:
    """A checkpoint; our model gives the shapes, random numbers the weights."""
    config, model = copy.deepcopy(config), from_reference(config, None).model
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "classifier": {}}
    state = model.state_dict()
    for ours, theirs in their_names(model, state).items():
        part, _, rest = theirs.partition(".")
        parts[part][rest] = torch.randn(state[ours].shape, generator=generator)
    parts["encoder"]["encoder.conv1.bn.running_mean_0"] = torch.zeros(32)  # ignored
    return {
        "file": "train.py",
        "config": config,
        "encoder": config["encoder"],
        "encoder_args": config["encoder_args"],
        "encoder_state_dict": parts["encoder"],
        "classifier": "logistic",
        "classifier_args": {"n_way": 5, "in_dim": 800},
        "classifier_state_dict": parts["classifier"],
        "training": {"epoch": 3},
    }
