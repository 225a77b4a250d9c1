"""Image files, decoded and scaled; every broken one is named."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.data.formats.spool import Blob
from raymaml.data.importers.depth import bands, in_eight_bits

UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and that are not read: for PostScript it would start Ghostscript, of
the others it has no pixels."""
PIXELS = 89_478_485
"""Default limit of an image: Pillow takes more for a bomb."""
MOST_IMAGE_BYTES = 256 << 20
"""Of an image file, which is read whole."""
Images = NDArray[np.uint8]
"""[n, H, W, C]."""
Read = Callable[[], bytes | Blob]
Transform = Callable[[Image.Image], NDArray[np.uint8]]
"""Makes an array [H, W, C] of an image."""


@functools.cache
def suffixes() -> dict[str, str]:
    """Return the suffixes of files that Pillow reads, in small letters, with their formats."""
    known = Image.registered_extensions().items()
    return {suffix: kind for suffix, kind in known if kind in Image.OPEN and kind not in UNREAD}


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that Pillow may take a file for, whatever its name."""
    return tuple(sorted(set(suffixes().values())))


def decode(files: Iterable[tuple[str, Read, Transform]], most_pixels: int | None = None) -> Images:
    """Decode files, apply their transforms and stack the results.

    Args:
        files: for each, its name for messages, a function that reads it, and its transform.
        most_pixels: larger images are refused; by default those that Pillow finds too large.

    Raises:
        UserError: naming each file that is not an image, is truncated or is too large.
    """
    images = []
    with gathered() as mistakes:
        for name, read, transform in files:
            with mistakes.kept(), readable(name, most_pixels):
                images.append(_decoded(read(), transform, most_pixels or PIXELS))
    return np.stack(images)


@contextlib.contextmanager
def readable(name: str, most_pixels: int | None = None) -> Iterator[None]:
    """Name the image that the block cannot read; the arguments are those of ``decode``.

    Raises:
        UserError: instead of any other error.
    """
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        larger = "raise data.source.max_megapixels" if most_pixels else "remove it"
        size = str(error).partition(" exceeds")[0]
        raise UserError(
            f"{name}: is not a readable image ({size} exceeds {most_pixels or PIXELS})",
            remedy=f"scale it down, or {larger}",
        ) from None
    except FileNotFoundError:
        raise UserError(f"{name}: does not exist", remedy="mend the path") from None
    except Exception as error:  # Pillow has no list of the exceptions that damage raises
        # Pillow's own message for this one names an object in memory
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if unknown else reason_of(error)
        raise UserError(
            f"{name}: is not a readable image ({reason})", remedy="mend or remove it"
        ) from None


def _decoded(data: bytes | Blob, transform: Transform, most_pixels: int) -> NDArray[np.uint8]:
    if isinstance(data, Blob):
        require_length(data.length)
        data = data.read()
    with warnings.catch_warnings(), _limited(most_pixels):
        warnings.simplefilter("ignore")  # on odd metadata, which nothing uses
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data), formats=formats()) as image, _unheard(image.format):
            if (excess := image.width * image.height / PIXELS) > 1:
                # a JPEG can be decoded at a half, a quarter or an eighth of its size
                step = 2 * math.sqrt(excess)
                image.draft(None, (round(image.width / step), round(image.height / step)))
            return transform(in_eight_bits(image, data))


@contextlib.contextmanager
def _limited(most_pixels: int) -> Iterator[None]:
    """Have Pillow warn of images of more pixels, before it decodes them."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _unheard(kind: str | None) -> Iterator[None]:
    """Drop the lines that libtiff writes to standard error; an exception reports the error."""
    if kind != "TIFF":
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def decode_files(
    paths: Iterable[Path], transform: Transform, most_pixels: int | None = None
) -> Images:
    """As ``decode``, of files on disk."""
    return decode(
        ((str(path), partial(read_whole, path), transform) for path in paths), most_pixels
    )


def read_whole(path: Path, most: int = MOST_IMAGE_BYTES) -> bytes:
    """Return the bytes of a file, and of no pipe or device.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or longer than ``most`` bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    require_length(status.st_size, most)
    return path.read_bytes()


def require_length(length: int, most: int = MOST_IMAGE_BYTES) -> None:
    """Check the length of a file that is read whole; raises ``ValueError`` if too great."""
    if length > most:
        raise ValueError(f"{length:,} bytes are more than the {most:,} that are read")


def is_file(path: Path) -> bool:
    """Whether there is such a file; for names, too, that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def squashed(size: int) -> Transform:
    """Return a transform to a square [size, size, 3] that disregards the image's aspect."""
    return lambda image: np.asarray(
        image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    )


def squared(size: int) -> Transform:
    """Return a transform that scales the shorter side and takes the middle [size, size, 3]."""
    return lambda image: np.asarray(
        ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    )


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Return an image as it is meant to be seen, "RGB" or "L": turned upright, on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_white(image, mode)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """Lay a transparent image on white: pixels under transparency are arbitrary."""
    flat = Image.new(mode, image.size)
    for box in bands(image.size):
        overlay = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        white.alpha_composite(overlay)
        flat.paste(white.convert(mode), box)
    return flat


def resized(images: Images, size: int) -> Images:
    """Scale images [n, H, W, 3] to ``size`` with Lanczos' filter; those of the size stay as is."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([squashed(size)(Image.fromarray(image)) for image in images])
