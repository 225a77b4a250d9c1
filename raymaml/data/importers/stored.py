"""Bytes and arrays that stay in their file: what is asked for is read, never the whole.

Reading is by position (``pread``), not by memory map: mapped pages would count as resident.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError

CHUNK = 1 << 20
"""Bytes that a copy holds in memory."""
UNPACKED, PACKED_AT_MOST = 64 << 20, 100
"""What is unpacked may have so many bytes, and beyond them so many times the bytes that it had
packed; images were packed by much less. More is a bomb, which would fill the disk."""


class StoredFile:
    """A file open for reading by position; closed when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.length = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``.

        Raises:
            EOFError: the file ends before.
        """
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; raises ``EOFError`` where the file ends before."""
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise EOFError("the file ends too early")
            buffer, offset = buffer[count:], offset + count

    def stream(self) -> IO[bytes]:
        """Return the file for reading from its start; one such stream at a time."""
        stream = os.fdopen(os.dup(self._descriptor), "rb")
        stream.seek(0)
        return stream


@dataclass(frozen=True, slots=True)
class Blob:
    """A range of bytes of a file."""

    file: StoredFile
    offset: int
    length: int

    def read(self) -> bytes:
        """Return all bytes."""
        return self.file.read(self.offset, self.length)


@dataclass(slots=True, eq=False)
class StoredArray:
    """An array whose values lie in a blob, or in memory when they are few."""

    data: Blob | bytes = b""
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    shape: tuple[int, ...] = (0,)
    fortran: bool = False

    def read(self) -> NDArray[Any]:
        """Return the whole array."""
        data = self.data.read() if isinstance(self.data, Blob) else self.data
        return np.frombuffer(data, self.dtype).reshape(
            self.shape, order="F" if self.fortran else "C"
        )

    def rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the entries ``rows`` of the first axis: [len(rows), *shape[1:]]."""
        if self.fortran or not isinstance(self.data, Blob):
            return self.read()[rows]  # nobody stores images in Fortran's order
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if out.size:
            stride = out[0].nbytes
            buffer = out.reshape(-1).view(np.uint8).data
            for place, row in enumerate(rows.tolist()):
                target = buffer[place * stride : (place + 1) * stride]
                self.data.file.read_into(self.data.offset + row * stride, target)
        return out


def open_blob(path: Path) -> Blob:
    """Open a whole file.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        file = StoredFile(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its rights") from None
    return Blob(file, 0, file.length)


class ScratchFile:
    """A file without a name that grows; what it holds goes when nothing refers to it any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._no_room(error) from None
        self._file = StoredFile(self._descriptor)
        self._end = 0

    def append(self, chunks: Iterable[bytes]) -> Blob:
        """Write ``chunks`` behind what is there.

        Raises:
            UserError: the disk is full.
        """
        start = self._end
        for chunk in chunks:
            rest = memoryview(chunk)
            try:
                while rest:
                    count = os.pwrite(self._descriptor, rest, self._end)
                    rest, self._end = rest[count:], self._end + count
            except OSError as error:
                raise self._no_room(error) from None
        return Blob(self._file, start, self._end - start)

    def _no_room(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder}: cannot hold what is unpacked for the import ({error.strerror}); make"
            " room there, or set data.bank to another disk"
        )


@dataclass(frozen=True)
class Scratch:
    """Room on disk for what must be unpacked before it can be read.

    Its files have no name, so nothing is left behind however the process ends. They lie beside
    the bank, where room is needed anyway.
    """

    bank: Path

    def new_file(self) -> ScratchFile:
        """Make an empty file.

        Raises:
            UserError: there is no room for it, or no right.
        """
        parents = self.bank.absolute().parents
        return ScratchFile(next(parent for parent in parents if parent.is_dir()))


def chunks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield what ``read(size)`` gives, piece by piece, until it gives nothing."""
    while chunk := read(CHUNK):
        yield chunk


def require_unpacked(length: int, packed: int) -> None:
    """Check how much ``packed`` bytes unpack to.

    Raises:
        ValueError: it is far more than data do.
    """
    if length > UNPACKED + PACKED_AT_MOST * packed:
        raise ValueError(f"{packed:,} bytes unpack to {length:,} or more, as no data do")


def bounded(chunks: Iterable[bytes], packed: int) -> Iterator[bytes]:
    """Yield what ``packed`` bytes unpack to, up to the bound of ``require_unpacked``.

    Raises:
        ValueError: it is more.
    """
    length = 0
    for chunk in chunks:
        length += len(chunk)
        require_unpacked(length, packed)
        yield chunk


def is_shape(shape: Sequence[object]) -> bool:
    """Whether ``shape`` could be an array's: whole numbers from 0."""
    return all(isinstance(length, int) and length >= 0 for length in shape)
