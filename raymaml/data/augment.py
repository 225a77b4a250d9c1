"""Random changes of images, a function of (seed, split, index, set, image) alone.

Parameters are drawn from the project's own bit streams, not from torch's global state: images are
made ready in a thread of their own, and an episode must not depend on what runs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raymaml.config.schema import Augmentation, AugmentPair
from raymaml.seeding import bit_stream, uniform


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """Augments the episodes of one split."""

    pair: AugmentPair
    seed: int
    split: str

    @property
    def is_active(self) -> bool:
        """Whether anything is changed at all."""
        return self.pair != AugmentPair()

    def __call__(self, images: Tensor, which: Literal["support", "query"], index: int) -> Tensor:
        """Augment the support or query images, uint8 [n, C, H, W], of episode ``index``.

        ``index`` counts on when training goes round its episodes again: other draws each time.
        """
        kind: Augmentation = getattr(self.pair, which)
        if kind == "none":
            return images
        from raymaml.data import changes  # here: torchvision takes longer to load than torch

        if kind == "enlarge":
            return changes.enlarge(images)
        bits = bit_stream(self.seed, "augment", self.split, index, which)
        shape = (len(images), changes.NUM_DRAWS)
        draws = uniform(bits, shape[0] * shape[1]).reshape(shape)
        change = changes.CHANGES[kind]
        changed = [change(image, d) for image, d in zip(images, draws, strict=True)]
        return torch.stack(changed)
