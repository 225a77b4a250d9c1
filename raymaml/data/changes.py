"""Changes of uint8 images by given draws; the operations are torchvision's (``transforms.v2``)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

PADDING = 8
"""Pixels of black that ``crop`` and ``color`` add on each side."""
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


def enlarge(images: Tensor) -> Tensor:
    """Scale up by 256/224 and crop the middle."""
    size = images.shape[-1]
    larger = TF.resize(images, [int(size * ENLARGEMENT)] * 2, antialias=True)
    middle: Tensor = TF.center_crop(larger, [size, size])
    return middle


def flip(image: Tensor, draws: Draws) -> Tensor:
    """Mirror left and right every second time."""
    return TF.horizontal_flip(image) if draws[0] < 0.5 else image


def crop(image: Tensor, draws: Draws) -> Tensor:
    """Cut the size of the image out of itself with a black border, and maybe mirror it."""
    height, width = image.shape[-2:]
    top, left = (int(d * (2 * PADDING + 1)) for d in draws[1:3])
    padded = TF.pad(image, [PADDING])
    return flip(TF.crop(padded, top, left, height, width), draws)


def color(image: Tensor, draws: Draws) -> Tensor:
    """Crop, then change brightness, contrast and saturation, in random order."""
    image = crop(image, draws)
    changes: list[Callable[[Tensor, float], Tensor]] = [
        TF.adjust_brightness,
        TF.adjust_contrast,
        TF.adjust_saturation,
    ]
    factors = 1 + JITTER * (2 * draws[3:6] - 1)
    for number in np.argsort(draws[6:9], kind="stable").tolist():
        image = changes[number](image, float(factors[number]))
    return image


def resize(image: Tensor, draws: Draws) -> Tensor:
    """Cut out a part of random area and shape, scale it to the size, and maybe mirror it."""
    size = list(image.shape[-2:])
    top, left, height, width = _box(size[0], size[1], draws)
    return flip(TF.resized_crop(image, top, left, height, width, size, antialias=True), draws)


def _box(height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the first try that fits; else the whole image."""
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
