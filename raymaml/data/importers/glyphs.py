"""Glyphs: characters drawn with the text fonts that matplotlib ships. Nothing is downloaded.

A class is a character, an image of it a font and a small random affine distortion. The splits are
disjoint in script: Latin letters, digits and symbols train, Greek validates, and the other
alphabets (with the default ``min_fonts``: Armenian, Cyrillic, Georgian) test.

These rules keep the task honest:

- A font counts for a character when its own character map has it, the drawing is neither empty
  nor the font's box for missing characters, and differs from the drawings of the other fonts
  (styles of one family often share their symbols).
- A character that looks like one earlier character in at least half of its fonts is no class
  (``without_doubles``).
- Marks (Unicode category M), spaces and control characters are no classes.
- Size stays as the font has it, so that "O" and "o" differ; the place in the image means
  nothing: the ink is centred before it is distorted.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from raymaml.config.data_sources import GlyphsSource
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.seeding import bit_stream, draw_without_replacement, uniform

FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
"""Text fonts with Unicode character maps. Of the others that matplotlib ships, cm* have TeX's
encodings, STIXSiz* and STIXNonUni* parts of formulas, LastResort a box for every character."""

VAL_SCRIPTS = {"GREEK", "COPTIC"}
TEST_SCRIPTS = {
    *("ARABIC", "ARMENIAN", "CANADIAN", "CHEROKEE", "CYRILLIC", "GEORGIAN", "HEBREW", "LAO"),
    *("LISU", "NKO", "OGHAM", "TIFINAGH"),
}
"""Words of Unicode character names; a name with none of them belongs to train."""

LICENCE = "fonts: Bitstream Vera and DejaVu changes (free), STIX (SIL Open Font License 1.1)"

_COMPARED_EM = 24  # pixels an em when drawings are compared
_EM = 0.85  # an em as a share of the image size
_FIT = 0.8  # ink is shrunk to at most this share of the image size
_SUPERSAMPLING = 2  # drawn this much larger, then averaged down
_MISSING = "\uffff"  # never a character, so every font draws its box for it
FRAME = (36, 48)
"""Height and width of the compared drawings in pixels, for an em of 24; larger ink is cut."""
SAME = 0.02
"""Two drawings are the same when the squared difference is below this share of either's square."""

Drawings = dict[str, NDArray[np.uint8]]
"""Font name -> its drawing of one character, [height * width]."""


def plan_glyphs(source: GlyphsSource, image_size: int) -> ImportPlan:
    """Find the characters that make classes, in code point order within each split."""
    drawings = _distinct_drawings(source.min_fonts)
    kept = sorted(without_doubles(drawings), key=lambda char: (SPLITS.index(split_of(char)), char))
    fonts = _load_fonts(round(_EM * image_size * _SUPERSAMPLING))
    classes = []
    for char in kept:
        own = [fonts[name] for name in distinct_fonts(drawings[char])]
        classes.append(
            PlannedClass(
                name=f"{unicodedata.name(char)} (U+{ord(char):04X})",
                split=split_of(char),
                images=range(source.images_per_class),
                read=partial(_draw, char, own, source, image_size),
            )
        )
    counts = Counter(planned.split for planned in classes)
    scripts = ("Latin, symbols", "Greek", "other alphabets")
    shares = ", ".join(
        f"{counts[s]} {s} ({which})" for s, which in zip(SPLITS, scripts, strict=True)
    )
    facts = source.model_dump_json(exclude={"kind", "duplicates"})
    return ImportPlan(
        source=f"glyphs of matplotlib's DejaVu and STIX fonts: {shares}; {facts}",
        licence=LICENCE,
        num_channels=1,
        classes=tuple(classes),
    )


def split_of(char: str) -> Split:
    """Return the split of a character's script, by the words of its Unicode name."""
    words = set(unicodedata.name(char).replace("-", " ").split())
    if words & TEST_SCRIPTS:
        return "test"
    return "val" if words & VAL_SCRIPTS else "train"


def _load_fonts(em: int) -> dict[str, FreeTypeFont]:
    # the basic layout draws the same everywhere, whether or not Pillow finds Raqm
    return {
        path.stem: ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)
        for path in sorted(Path(mpl.get_data_path(), "fonts", "ttf").glob("*.ttf"))
        if path.stem.startswith(FAMILIES) and "Display" not in path.stem
    }


def _distinct_drawings(min_fonts: int) -> dict[str, Drawings]:
    """Draw the characters with every font that has them; keep those with enough drawings."""
    fonts = _load_fonts(_COMPARED_EM)
    charmaps = {name: FT2Font(str(font.path)).get_charmap() for name, font in fonts.items()}
    drawings: dict[str, Drawings] = {char: {} for char in _candidates(charmaps.values(), min_fonts)}
    for name, font in fonts.items():
        missing = _ink(font, _MISSING)
        for char, drawn in drawings.items():
            ink = _ink(font, char) if ord(char) in charmaps[name] else None
            if ink is not None and ink != missing:
                drawn[name] = frame(ink)
    return {char: own for char, own in drawings.items() if len(distinct_fonts(own)) >= min_fonts}


def _candidates(charmaps: Iterable[Iterable[int]], min_fonts: int) -> list[str]:
    """Return the characters that the character maps of enough fonts have."""
    having = Counter(code for charmap in charmaps for code in charmap)
    chars = (chr(code) for code, count in having.items() if count >= min_fonts)
    return sorted(char for char in chars if unicodedata.category(char)[0] not in "MZC")


def _ink(font: FreeTypeFont, char: str) -> Image.Image | None:
    """Draw a character, white on black, cropped to its ink; None when there is none."""
    em = int(font.size)
    canvas = Image.new("L", (4 * em, 3 * em))
    ImageDraw.Draw(canvas).text((em, 2 * em), char, fill=255, font=font, anchor="ls")
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


def _draw(
    char: str, fonts: list[FreeTypeFont], source: GlyphsSource, size: int, numbers: Iterable[int]
) -> NDArray[np.uint8]:
    """Draw images [n, size, size, 1] of a character, going round its fonts in seeded order."""
    inks = [ink for font in fonts if (ink := _ink(font, char)) is not None]
    bits = bit_stream(source.seed, "glyph-fonts", ord(char))
    order = draw_without_replacement(bits, len(inks), len(inks))
    images = []
    for number in numbers:
        # rotation, scale, shear and the two shifts, each in -strength..strength
        draws = uniform(bit_stream(source.seed, "glyph", ord(char), number), 5)
        distortion = ((2 * draws - 1) * source.distortion).tolist()
        images.append(_distort(inks[order[number % len(order)]], size, distortion))
    return np.stack(images)[..., None]


def _distort(ink: Image.Image, size: int, distortion: list[float]) -> NDArray[np.uint8]:
    """Put ink in the middle of an image [size, size], sheared, scaled, rotated and shifted."""
    rotation, growth, shear, right, down = distortion
    large = size * _SUPERSAMPLING
    scale = min(1.0, _FIT * large / max(ink.size)) * (1 + 0.12 * growth)
    # Pillow asks where a pixel comes from: back = inverse of scale * rotation * shear
    cos, sin = (f(math.radians(10) * rotation) / scale for f in (math.cos, math.sin))
    back = (cos + 0.1 * shear * sin, sin - 0.1 * shear * cos, -sin, cos)
    x, y = (0.5 + 0.06 * right) * large, (0.5 + 0.06 * down) * large  # where the ink's centre goes
    # a black frame of two pixels, so that edges fade out instead of being cut
    framed = Image.new("L", (ink.width + 4, ink.height + 4))
    framed.paste(ink, (2, 2))
    drawn = framed.transform(
        (large, large),
        Image.Transform.AFFINE,
        (
            *(back[0], back[1], framed.width / 2 - back[0] * x - back[1] * y),
            *(back[2], back[3], framed.height / 2 - back[2] * x - back[3] * y),
        ),
        resample=Image.Resampling.BILINEAR,
    )
    return np.asarray(drawn.reduce(_SUPERSAMPLING))


# Drawings are compared as vectors: the ink, centred in a fixed frame, at the font's own scale


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
