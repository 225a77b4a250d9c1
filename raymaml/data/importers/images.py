"""Image files, and CSVs that list them; every broken one is named."""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from raymaml.common.errors import UserError, reason_of
from raymaml.data.importers.depth import in_eight_bits
from raymaml.data.importers.stored import Blob

UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and that are not read: for PostScript it would start Ghostscript, of
the others it has no pixels."""
PIXELS = 89_478_485
"""Of an image, where nothing else is said: more is what Pillow finds too large."""
MOST_IMAGE_BYTES, MOST_TABLE_BYTES = 256 << 20, 512 << 20
"""Of an image file, and of a CSV, which are read whole."""
Read = Callable[[], bytes]
Transform = Callable[[Image.Image], NDArray[np.uint8]]


@functools.cache
def suffixes() -> dict[str, str]:
    """Return the suffixes of files that Pillow reads, in small letters, with their formats."""
    known = Image.registered_extensions().items()
    return {suffix: kind for suffix, kind in known if kind in Image.OPEN and kind not in UNREAD}


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that Pillow may take a file for, whatever its name."""
    return tuple(sorted(set(suffixes().values())))


def decode(
    files: Iterable[tuple[str, Read]], transform: Transform, most_pixels: int | None = None
) -> NDArray[np.uint8]:
    """Decode named files and stack what ``transform`` makes of them: uint8 [n, H, W, C].

    Args:
        files: names for messages, and what reads the files.
        transform: makes an array [H, W, C] of an image.
        most_pixels: larger images are refused; by default those that Pillow finds too large.

    Raises:
        UserError: naming each file that is not an image, is truncated or is too large.
    """
    images, problems = [], []
    for name, read in files:
        try:
            images.append(_decoded(read(), transform, most_pixels or PIXELS))
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            larger = "raise data.source.max_megapixels" if most_pixels else "remove it"
            size = str(error).partition(" exceeds")[0]
            problems.append(
                f"{name}: is not a readable image ({size} exceeds {most_pixels or PIXELS}); scale"
                f" it down, or {larger}"
            )
        except Exception as error:  # Pillow has no list of what it raises on damage
            problems.append(
                f"{name}: is not a readable image ({_reason(error)}); mend or remove it"
            )
    if problems:
        raise UserError(*problems)
    return np.stack(images)


def _decoded(data: bytes, transform: Transform, most_pixels: int) -> NDArray[np.uint8]:
    with warnings.catch_warnings(), _limited(most_pixels):
        warnings.simplefilter("ignore")  # on odd metadata, of which none is used
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
    """Drop what libtiff writes to standard error; the error itself comes as an exception."""
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


def image_bytes(blob: Blob) -> bytes:
    """Return the bytes of an image file that lies in another one.

    Raises:
        ValueError: they are too many.
    """
    require_length(blob.length, MOST_IMAGE_BYTES)
    return blob.read()


def require_length(length: int, most: int) -> None:
    """Check the length of what is read whole.

    Raises:
        ValueError: it is too great.
    """
    if length > most:
        raise ValueError(f"{length:,} bytes are more than the {most:,} that are read")


def read_whole(path: Path, most: int) -> bytes:
    """Return the bytes of a file, and of no pipe or device.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or too long.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    require_length(status.st_size, most)
    return path.read_bytes()


def is_file(path: Path) -> bool:
    """Whether there is such a file; for names, too, that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def decode_part(
    paths: Sequence[Path], transform: Transform, part: slice, most_pixels: int | None = None
) -> NDArray[np.uint8]:
    """Do as ``decode_files``, for a range of the files."""
    return decode_files(paths[part], transform, most_pixels)


def decode_files(
    paths: Iterable[Path], transform: Transform, most_pixels: int | None = None
) -> NDArray[np.uint8]:
    """As ``decode``, of files on disk."""
    reads = ((str(path), partial(read_whole, path, MOST_IMAGE_BYTES)) for path in paths)
    return decode(reads, transform, most_pixels)


def read_csv(table: Path, name: str, remedy: str) -> list[list[str]]:
    """Return the rows of a CSV.

    Raises:
        UserError: it cannot be read; ``name`` begins the message and ``remedy`` ends it.
    """
    try:
        text = _text(read_whole(table, MOST_TABLE_BYTES))
        first = text.partition("\n")[0]
        comma = next((mark for mark in ",;\t" if mark in first), ",")
        return list(csv.reader(StringIO(text, newline=""), delimiter=comma))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{table}:{line}: is not UTF-8 (byte {error.object[error.start]:#04x}); save the list"
            ' as UTF-8, which spreadsheets offer as "CSV UTF-8"'
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{name} cannot be read ({error}); {remedy}") from None


def _text(data: bytes) -> str:
    """Decode a list: UTF-8, or UTF-16 where the file begins with its mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters; save it as UTF-8")
    return text


def squashed(size: int) -> Transform:
    """Return what makes a square [size, size, 3] of an image, whatever its aspect."""
    return lambda image: np.asarray(
        image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    )


def squared(size: int) -> Transform:
    """Return what scales an image's shorter side and takes the middle [size, size, 3]."""
    return lambda image: np.asarray(
        ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"  # Pillow's message names an object in memory
    return reason_of(error)
