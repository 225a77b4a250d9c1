"""A tiny configuration."""

from __future__ import annotations

from typing import Any

from raymaml.config.explain import validated
from raymaml.config.schema import Config

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
    return validated(Config, TREE | sections, "tiny")
