"""Random changes of uint8 images, a function of (seed, split, index, set, image) alone.

The operations are torchvision's (``transforms.v2``). Their parameters come from the project's own
bit streams, not from torch's global state: a thread of its own prepares the images, and an episode
must not depend on work that runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymaml.config.base import Augmentation
from raymaml.config.schema import AugmentPair
from raymaml.seeding import bit_stream, uniform

PADDING = 8
"""Width of the black border that ``crop`` and ``color`` add on each side, pixels."""
JITTER = 0.4
"""Brightness, contrast and saturation are multiplied by 1 - 0.4 to 1 + 0.4."""
ENLARGEMENT = 256 / 224
AREA, LOG_RATIO, TRIES = (0.08, 1.0), math.log(4 / 3), 10
"""Share of the area, largest log of width/height and tries of a random resized crop (Szegedy et
al. 2015, as torchvision draws it)."""

NUM_DRAWS = 6 + 2 * TRIES
Draws = NDArray[np.float64]
"""Uniform numbers of one image, [NUM_DRAWS]: flip, two positions, three of the jitter, its order by
the first three tries, and the tries."""


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """Augments the episodes of one split."""

    pair: AugmentPair
    seed: int
    split: str

    def __call__(self, images: Tensor, which: str, index: int) -> Tensor:
        """Augment the images of a set, uint8 [n, C, H, W], of episode ``index``.

        ``which`` is "support" or "query". ``index`` keeps counting when training repeats its
        episodes, so each pass draws other changes.
        """
        kind: Augmentation = getattr(self.pair, which)
        if kind == "none":
            return images
        if kind == "enlarge":
            return enlarge(images)
        bits = bit_stream(self.seed, "augment", self.split, index, which)
        draws = uniform(bits, len(images) * NUM_DRAWS).reshape(len(images), NUM_DRAWS)
        change = CHANGES[kind]
        return torch.stack([change(image, d) for image, d in zip(images, draws, strict=True)])


@cache
def _torchvision() -> ModuleType:
    """Load the operations when they are first needed: torchvision loads slower than torch."""
    from torchvision.transforms.v2 import functional

    module: ModuleType = functional
    return module


def enlarge(images: Tensor) -> Tensor:
    """Scale up by 256/224 and crop the middle."""
    size = images.shape[-1]
    larger = _torchvision().resize(images, [int(size * ENLARGEMENT)] * 2, antialias=True)
    middle: Tensor = _torchvision().center_crop(larger, [size, size])
    return middle


def flip(image: Tensor, draws: Draws) -> Tensor:
    """Mirror left and right every second time."""
    return image.flip(-1) if draws[0] < 0.5 else image


def crop(image: Tensor, draws: Draws) -> Tensor:
    """Add a black border, cut the size of the image out at random, and flip at random."""
    height, width = image.shape[-2:]
    top, left = (int(d * (2 * PADDING + 1)) for d in draws[1:3])
    padded = _torchvision().pad(image, [PADDING])
    return flip(padded[..., top : top + height, left : left + width], draws)


def color(image: Tensor, draws: Draws) -> Tensor:
    """Crop, then change brightness, contrast and saturation, in random order."""
    image = crop(image, draws)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    factors = 1 + JITTER * (2 * draws[3:6] - 1)
    for number in np.argsort(draws[6:9], kind="stable").tolist():
        image = getattr(_torchvision(), names[number])(image, float(factors[number]))
    return image


def resize(image: Tensor, draws: Draws) -> Tensor:
    """Cut out a part of random area and shape, scale it to the size, and flip at random."""
    size = list(image.shape[-2:])
    part = _box(size[0], size[1], draws)
    return flip(_torchvision().resized_crop(image, *part, size, antialias=True), draws)


def _box(height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the first try that fits, else of the image."""
    for area_draw, ratio_draw in draws[6:].reshape(TRIES, 2).tolist():
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area_draw)
        ratio = math.exp(LOG_RATIO * (2 * ratio_draw - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1))
            return top, left, h, w
    return 0, 0, height, width


CHANGES: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "flip": flip,
    "crop": crop,
    "color": color,
    "resize": resize,
}
