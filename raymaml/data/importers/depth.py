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

import math
import re
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile

DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Bits a value."""
_UNSIGNED = 1  # of SAMPLEFORMAT
_BAND = 1 << 18
"""Pixels that are converted at a time, so that a large picture is not held several times."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
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
        unsigned = _is_unsigned(image)
        shallow = _scaled(
            lambda box: _values(image, box).view(np.uint32) if unsigned else _values(image, box),
            image.size,
        )
    elif rawmode := _SIXTEEN_BITS.fullmatch(_rawmode(image)):
        with Image.open(BytesIO(data), formats=[str(image.format)]) as low:
            _read_as(low, rawmode[1] + _OTHER_ORDER[rawmode[2]])
            shallow = _scaled(
                lambda box: _values(image, box) * np.uint16(256) + _values(low, box), image.size
            )
    else:
        return image
    if orientation := image.getexif().get(Base.Orientation):
        shallow.getexif()[Base.Orientation] = orientation
    return shallow


def to_eight_bits(values: NDArray[Any], least: float, largest: float) -> NDArray[np.uint8]:
    """Return the highest eight bits of the depth in use; see the module.

    Args:
        values: some of a picture.
        least: of the whole picture.
        largest: as ``least``.

    Raises:
        ValueError: a value has more than 32 bits.
    """
    if values.dtype.kind == "f" and least > -2 and largest < 2:
        unit = values.clip(-1, 1)
        unit = (unit + 1) / 2 if least < 0 else unit
        byte: NDArray[np.uint8] = np.rint(unit * 255).astype(np.uint8)
        return byte
    least, largest = round(least), round(largest)
    most = largest if least >= 0 else max(-least, largest + 1) * 2 - 1
    depth = next((bits for bits in DEPTHS if most < 1 << bits), None)
    if depth is None:
        raise ValueError(f"it holds values of more than {DEPTHS[-1]} bits")
    whole: NDArray[np.int64] = np.rint(values).astype(np.int64)
    if least < 0:
        whole += 1 << (depth - 1)
    return np.right_shift(whole, depth - 8).astype(np.uint8)


def _rawmode(image: Image.Image) -> str:
    """Return how the values lie in the file, as Pillow calls it; "" if unknown."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _read_as(image: ImageFile, rawmode: str) -> None:
    """Have ``image`` read its values as if they lay in another way."""
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]


def _values(image: Image.Image, box: Box) -> NDArray[Any]:
    return np.asarray(image.crop(box))


def bands(size: tuple[int, int]) -> list[Box]:
    """Divide an image of ``size`` (W, H) into bands of rows, of a bounded number of pixels."""
    width, height = size
    rows = max(1, _BAND // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def _scaled(read: Callable[[Box], NDArray[Any]], size: tuple[int, int]) -> Image.Image:
    """Scale a picture band by band, its opacity apart: opaque is the most that a file holds.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    first = read((0, 0, 1, 1))
    groups = (slice(0, 3), slice(3, None)) if first.ndim == 3 else (slice(None),)
    out = Image.new(Image.fromarray(first.astype(np.uint8)).mode, size)
    scales = []
    for channels in [group for group in groups if first[..., group].size]:
        parts = (read(box)[..., channels] for box in bands(size))
        lows, highs = zip(*((part.min(), part.max()) for part in parts), strict=True)
        least, largest = np.min(lows).item(), np.max(highs).item()
        if not math.isfinite(least) or not math.isfinite(largest):
            raise ValueError("it holds NaN or infinity")
        scales.append((channels, least, largest))
    for box in bands(size):
        values = read(box)
        band = np.empty(values.shape, np.uint8)
        for channels, least, largest in scales:
            band[..., channels] = to_eight_bits(values[..., channels], least, largest)
        out.paste(Image.fromarray(band), box)
    return out


def _is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit values have no sign; Pillow gives all of them one."""
    if image.mode != "I" or not isinstance(image, TiffImageFile):
        return False
    return bool(image.tag_v2.get(SAMPLEFORMAT, (_UNSIGNED,))[0] == _UNSIGNED)
