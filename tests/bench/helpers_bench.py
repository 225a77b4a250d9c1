"""A tiny configuration, and an encoder that is another one in each process."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from raymaml.config.load import check_config
from raymaml.config.schema import Config
from raymaml.models.convnet4 import ConvNet4

SPLIT = {"num_ways": 3, "num_shots": 1, "num_queries": 2, "num_episodes": 1}
TREE = {
    "name": "tiny",
    "data": {
        "source": {"kind": "omniglot", "path": "none"},
        "bank": "none",
        "shards": "none",
        "image_size": 16,
    },
    "episodes": {"train": SPLIT, "val": SPLIT, "test": SPLIT},
    "model": {"width": 2},
    "inner": {"num_steps": 2, "lr": 0.1},
    "outer": {"num_steps": 1},
    "cluster": {"num_workers": 2, "device": "cpu"},
}


def tiny(**sections: dict[str, Any]) -> Config:
    """3-way 1-shot on 16x16x1, in which whole ``sections`` may be replaced."""
    return check_config(TREE | sections, "tiny")


class Restless(ConvNet4):
    """An encoder whose features depend on the process that computes them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + os.getpid() % 97 / 100)
