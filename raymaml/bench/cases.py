"""The configurations that are measured, and their made-up episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raymaml.config.explain import validated
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.config.sources import ImageFolderSource
from raymaml.seeding import fold_in
from raymaml.storage.place import Place
from raymaml.types import Episode

Phase = Literal["training", "evaluation"]
"""training: one meta-gradient; evaluation: adaptation without a graph, and the query pass."""
PHASES: tuple[Phase, ...] = ("training", "evaluation")

_MINI = {"kind": "mini-imagenet", "path": "unused"}
_OMNIGLOT = {"kind": "omniglot", "path": "unused"}


def configs_to_measure(path: Place | None, overrides: Sequence[str]) -> list[Config]:
    """Return the user's configuration, or the standard ones if ``path`` is None.

    Raises:
        UserError: The configuration has mistakes.
    """
    if path is not None:
        return [load_config(path, overrides)]
    return [
        _standard("convnet4-32-84x84-5way-1shot", source=_MINI, size=84, shots=1, width=32),
        _standard("convnet4-32-84x84-5way-5shot", source=_MINI, size=84, shots=5, width=32),
        _standard("convnet4-64-28x28-5way-1shot", source=_OMNIGLOT, size=28, shots=1, width=64),
    ]


def smallest() -> Config:
    """Return a configuration that takes no time: its first use loads the parts of a library."""
    return _standard("smallest", source=_OMNIGLOT, size=16, shots=1, width=1)


def _standard(name: str, *, source: dict[str, Any], size: int, shots: int, width: int) -> Config:
    """ConvNet4, 5 ways, 15 queries a class, 5 inner steps; no image is read from the source."""
    split = {"num_ways": 5, "num_shots": shots, "num_queries": 15, "num_episodes": 1}
    tree = {
        "name": name,
        "data": {"source": source, "bank": "unused", "shards": "unused", "image_size": size},
        "episodes": {"train": split, "val": split, "test": split},
        "model": {"encoder": "convnet4", "width": width},
        "inner": {"num_steps": 5, "lr": 0.01},
        "outer": {"num_steps": 1},
    }
    return validated(Config, tree, name)


def with_steps(config: Config, num_steps: int) -> Config:
    """Return ``config`` with another number of inner steps in training."""
    inner = config.inner.model_copy(update={"num_steps": num_steps})
    return config.model_copy(update={"inner": inner})


def image_shape(config: Config) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of the source of ``config``."""
    source, size = config.data.source, config.data.image_size
    folder_of_gray = isinstance(source, ImageFolderSource) and source.mode == "gray"
    gray = folder_of_gray or source.kind in {"glyphs", "omniglot"}
    return (1 if gray else 3), size, size


def made_up_episode(
    config: Config, phase: Phase, device: torch.device, dtype: torch.dtype
) -> Episode:
    """Draw an episode of normal noise; ``config`` decides it up to rounding."""
    spec = config.episodes.of("train" if phase == "training" else "test")
    generator = torch.Generator().manual_seed(fold_in(config.seed, "bench", phase))

    def draw(per_class: int) -> tuple[Tensor, Tensor]:  # [N*K or N*Q, C, H, W], [N*K or N*Q]
        shape = (spec.num_ways * per_class, *image_shape(config))
        images = torch.randn(shape, generator=generator).to(device, dtype)
        return images, torch.arange(spec.num_ways, device=device).repeat_interleave(per_class)

    (support_x, support_y), (query_x, query_y) = draw(spec.num_shots), draw(spec.num_queries)
    return Episode(support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y)
