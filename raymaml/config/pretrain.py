"""The section `pretrain`: the encoder as a plain classifier, before meta-training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from raymaml.config.base import Augmentation, PositiveInt
from raymaml.config.model import OuterSteps


class PretrainConfig(OuterSteps):
    """Plain learning by cross-entropy, of the encoder and a linear head over all training classes.

    The head is left behind (as for UNICORN-MAML, Ye and Chao 2022).
    """

    section = "pretrain"
    unit = "images"
    batch_size: Annotated[PositiveInt, Field(le=1_000_000)] = 128
    """Images per step, over all workers: whole slices; at most 1,000,000."""
    slice_size: Annotated[PositiveInt, Field(le=100_000)] = 16
    """Images whose gradient is one, and whose moments batch norm takes; at most 100,000. The
    weights depend on it, and not on the number of workers, which share out the slices."""
    augment: Augmentation = "none"
    """Change of the images, as in `data.augment`."""

    @property
    def meta_batch_size(self) -> int:
        """Slices per step."""
        return self.batch_size // self.slice_size

    @property
    def per_step(self) -> int:
        """Images per step."""
        return self.batch_size

    @model_validator(mode="after")
    def _slices_are_whole(self) -> PretrainConfig:
        if self.batch_size % self.slice_size:
            raise ValueError(
                f"pretrain.batch_size is {self.batch_size} and pretrain.slice_size is"
                f" {self.slice_size}; give a multiple of the slices"
            )
        return self
