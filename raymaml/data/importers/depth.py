"""Pictures of more than eight bits a value, in eight: one rule for all modes.

The depth in use is the smallest of ``DEPTHS`` that holds the largest value of the picture, and its
highest eight bits are kept. A file of 16 bits may hold values of 10, 12 or 14 (cameras, scanners):
by the depth of the file they would be nearly black. Stretching each picture between its own least
and largest value would show them too, but would take away how bright it is; by the depth in use
two pictures of one kind keep their relation.

- Pictures with values below zero: the depth counts the sign, and zero is middle grey.
- Floats up to 1 count as 0 to 1, or -1 to 1 where some are below zero. Values of less than 2 do,
  too, and are cut at 1: filters overshoot. Larger floats count as whole numbers.
- 16-bit colours: the channels share one depth, opacity has its own. Of 16-bit grey with opacity
  Pillow gives the high byte alone, which is taken as it is.
- Pictures of eight bits or less are never scaled, whatever they hold.
"""

from __future__ import annotations

import re
import sys
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile

DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Bits a value."""
_UNSIGNED = 1  # of SAMPLEFORMAT
_SIXTEEN_BITS = re.compile(r"(RGB[AX]?;16)([BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Pillow keeps the high byte of 16-bit colours; read in the other order, it keeps the low one."""


def in_eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Return ``image``, or the same picture in eight bits a value, which stands as it stood.

    ``data`` is the file that ``image`` was opened from.

    Raises:
        ValueError: it holds NaN, infinity, or more than 32 bits.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        pixels = to_eight_bits(values.view(np.uint32) if _is_unsigned(image) else values)
    elif rawmode := _SIXTEEN_BITS.fullmatch(_rawmode(image)):
        values = _sixteen_bits(image, data, rawmode[1] + _OTHER_ORDER[rawmode[2]])
        colours, alpha = values[..., :3], values[..., 3:]  # opaque is the most that a file holds
        parts = [to_eight_bits(part) for part in (colours, alpha) if part.size]
        pixels = np.concatenate(parts, axis=-1)
    else:
        return image
    shallow = Image.fromarray(pixels)
    if orientation := image.getexif().get(Base.Orientation):
        shallow.getexif()[Base.Orientation] = orientation
    return shallow


def to_eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the highest eight bits of the depth in use; see the module.

    Raises:
        ValueError: a value is NaN or infinite, or has more than 32 bits.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
        if np.abs(values).max() < 2:
            unit = values.clip(-1, 1)
            unit = (unit + 1) / 2 if unit.min() < 0 else unit
            return np.rint(unit * 255).astype(np.uint8)
        if np.abs(values).max() >= 2.0**32:
            raise ValueError("it holds values of more than 32 bits")
        values = np.rint(values)
    whole = values.astype(np.int64)
    least, largest = int(whole.min()), int(whole.max())
    if least < 0:
        depth = _depth(max(-least, largest + 1) * 2 - 1)
        whole += 1 << (depth - 1)
    else:
        depth = _depth(largest)
    return (whole >> (depth - 8)).astype(np.uint8)


def _depth(largest: int) -> int:
    for depth in DEPTHS:
        if largest < 1 << depth:
            return depth
    raise ValueError(f"it holds values of more than {DEPTHS[-1]} bits")


def _rawmode(image: Image.Image) -> str:
    """Return how the values lie in the file, as Pillow calls it; "" where it does not say."""
    tiles: Any = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _sixteen_bits(image: Image.Image, data: bytes, rawmode: str) -> NDArray[np.uint16]:
    """Return 16-bit colours [H, W, C]; Pillow gives one byte of them at a time."""
    with Image.open(BytesIO(data), formats=[str(image.format)]) as other:
        tiles: Any = other.tile
        other.tile = [
            tile._replace(
                args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode
            )
            for tile in tiles
        ]
        low = np.asarray(other).astype(np.uint16)
    return low + np.asarray(image).astype(np.uint16) * np.uint16(256)


def _is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit values have no sign; Pillow gives all of them one."""
    if image.mode != "I" or not isinstance(image, TiffImageFile):
        return False
    tags = image.tag_v2
    return bool(tags.get(SAMPLEFORMAT, (_UNSIGNED,))[0] == _UNSIGNED)
