"""Image files, and CSVs that list them; every broken one is named."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from raymaml.errors import UserError, reason_of

Read = Callable[[], bytes]
Transform = Callable[[Image.Image], NDArray[np.uint8]]


def decode(files: Iterable[tuple[str, Read]], transform: Transform) -> NDArray[np.uint8]:
    """Decode named files and stack what ``transform`` makes of them: uint8 [n, H, W, C].

    Raises:
        UserError: naming each file that is not an image, is truncated or is too large.
    """
    images, problems = [], []
    for name, read in files:
        try:
            with Image.open(BytesIO(read())) as image:
                images.append(transform(image))
        except (
            OSError,
            SyntaxError,  # how Pillow's PNG reader reports a damaged chunk
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
            Image.DecompressionBombError,
        ) as error:
            problems.append(
                f"{name}: is not a readable image ({_reason(error)}); mend or remove it"
            )
    if problems:
        raise UserError(*problems)
    return np.stack(images)


def decode_files(paths: Iterable[Path], transform: Transform) -> NDArray[np.uint8]:
    """As ``decode``, of files on disk."""
    return decode(((str(path), path.read_bytes) for path in paths), transform)


def read_csv(table: Path, name: str, remedy: str) -> list[list[str]]:
    """Return the rows of a CSV.

    Raises:
        UserError: it cannot be read; ``name`` begins the message and ``remedy`` ends it.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name} cannot be read ({error}); {remedy}") from None


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
