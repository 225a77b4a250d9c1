"""Reading the pictures of a list, chunk by chunk, without PyTorch, so that a reader starts soon.

A chunk is a run of consecutive pictures. How a list is cut depends on the list, the size of the
images and the group size alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymaml.classify.pictures import Picture
from raymaml.common.errors import StorageError, UserError
from raymaml.common.logs import plain
from raymaml.data.preprocessing import Preprocessing

_CHUNK, _CHUNK_VALUES = 512, 1 << 26
"""Pictures of a chunk, or fewer, of larger pictures: this many values in all."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Pictures that are read: pixels of those that can be, and what is wrong with the others."""

    number: int
    names: Sequence[str]
    """One for each picture."""
    pixels: NDArray[np.uint8]
    """[n, H, W, C], of the pictures without error."""
    errors: Sequence[str | None]
    """One for each picture."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A list of pictures and how they become pixels."""

    preprocessing: Preprocessing
    pictures: Sequence[Picture]
    group: int = 1
    """Pictures that are judged together; a chunk is a number of whole groups."""

    @property
    def chunk_size(self) -> int:
        """Pictures of a chunk."""
        most = min(_CHUNK, _CHUNK_VALUES // math.prod(self.preprocessing.image_shape))
        return max(1, most // self.group) * self.group

    @property
    def num_chunks(self) -> int:
        """Chunks in all."""
        return -(-len(self.pictures) // self.chunk_size)

    def chunk(self, number: int) -> Sequence[Picture]:
        """Return the pictures of a chunk."""
        return self.pictures[number * self.chunk_size :][: self.chunk_size]

    def read(self, number: int) -> Chunk:
        """Read a chunk, see ``read_chunk``."""
        return read_chunk(number, self.chunk(number), self.preprocessing)


def read_chunk(number: int, pictures: Sequence[Picture], preprocessing: Preprocessing) -> Chunk:
    """Read the pictures of a chunk.

    Raises:
        StorageError: a URI cannot be reached.
    """
    pixels: list[NDArray[np.uint8]] = []
    errors: list[str | None] = []
    for picture in pictures:
        try:
            pixels.append(preprocessing.pixels(picture.place))
            errors.append(None)
        except StorageError:
            raise
        except UserError as error:
            problem = error.mistakes[0].problem
            errors.append(plain(problem.removeprefix(f"{picture.place}: ")))
    channels, height, width = preprocessing.image_shape
    return Chunk(
        number=number,
        names=[picture.name for picture in pictures],
        pixels=np.array(pixels, np.uint8).reshape(-1, height, width, channels),
        errors=errors,
    )
