"""Which characters make classes, told from how each font draws them.

Drawings are compared as vectors: the ink, centred in a fixed frame, at the font's own scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME = (36, 48)
"""Height and width of the compared drawings in pixels, for an em of 24; larger ink is cut."""
SAME = 0.02
"""Two drawings are the same when the squared difference is below this share of either's square."""

Drawings = dict[str, NDArray[np.uint8]]
"""Font name -> its drawing of one character, [height * width]."""


def frame(ink: Image.Image) -> NDArray[np.uint8]:
    """Centre ink in the frame of comparison; return it flat."""
    height, width = FRAME
    canvas = Image.new("L", (width, height))
    canvas.paste(ink, ((width - ink.width) // 2, (height - ink.height) // 2))
    return np.asarray(canvas).ravel()


def distinct_fonts(drawings: Drawings) -> list[str]:
    """Return the first font of each different drawing."""
    fonts: dict[bytes, str] = {}
    for name, drawing in drawings.items():
        fonts.setdefault(drawing.tobytes(), name)
    return list(fonts.values())


def without_doubles(drawings: Mapping[str, Drawings]) -> list[str]:
    """Return, in code point order, the characters that are not drawn as an earlier one is.

    A character is a double when at least half of the fonts that have it draw it as they draw one
    and the same earlier character: "A" and Greek Alpha, "o" and Armenian Oh.
    """
    chars = sorted(drawings)
    fonts = sorted({font for drawn in drawings.values() for font in drawn})
    same = np.zeros((len(chars), len(chars)), dtype=np.int16)
    for font in fonts:
        having = [i for i, char in enumerate(chars) if font in drawings[char]]
        vectors = np.stack([drawings[chars[i]][font] for i in having])
        same[np.ix_(having, having)] += _same(vectors)
    kept: list[int] = []
    for i, char in enumerate(chars):
        if 2 * same[i, kept].max(initial=0) < len(drawings[char]):
            kept.append(i)
    return [chars[i] for i in kept]


def _same(vectors: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Compare all pairs of rows: [n, n]."""
    # 16 levels keep every sum below 2**24, where float32 is exact: equal on every machine
    levels = (vectors >> 4).astype(np.float32)
    products: NDArray[np.float32] = levels @ levels.T
    squares = np.diag(products)
    differences = squares[:, None] + squares[None, :] - 2 * products
    same: NDArray[np.bool_] = differences < SAME * np.minimum(squares[:, None], squares[None, :])
    return same
