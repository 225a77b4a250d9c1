"""Bytes and arrays that stay in a file: an import reads the part that it needs, never the whole.

Reads are by position (``pread``), not through a memory map: mapped pages count as resident, and a
file that shrinks under its map kills the process.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError, reason_of

CHUNK = 1 << 20
"""Bytes that a copy holds in memory."""
UNPACKED, PACKED_AT_MOST = 64 << 20, 100
"""Unpacked data may take ``UNPACKED`` bytes and, beyond them, ``PACKED_AT_MOST`` times their packed
size; images pack much less. More is a bomb, which would fill the disk."""


class _Descriptor:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True)
class Blob:
    """A range of bytes of a file."""

    file: _Descriptor
    offset: int
    length: int

    def part(self, start: int, length: int) -> Blob:
        """Return a range of the range."""
        return Blob(self.file, self.offset + start, length)

    def read(self) -> bytes:
        """Return all bytes; raises ``EOFError`` where the file ends before them."""
        data = b""
        while rest := self.length - len(data):  # the system may return fewer bytes than asked for
            piece = os.pread(self.file.number, rest, self.offset + len(data))
            if not piece:
                raise EOFError("the file ends too early")
            data += piece
        return data

    def stream(self) -> IO[bytes]:
        """Return the file for reading from the range on; one such stream at a time."""
        stream = os.fdopen(os.dup(self.file.number), "rb")
        stream.seek(self.offset)
        return stream


@dataclass(slots=True, eq=False)
class StoredArray:
    """An array whose values lie in a blob, or in memory when they are few."""

    data: Blob | bytes = b""
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    shape: tuple[int, ...] = (0,)
    fortran: bool = False

    def read(self) -> NDArray[Any]:
        """Return the whole array."""
        values = np.frombuffer(
            self.data.read() if isinstance(self.data, Blob) else self.data, self.dtype
        )
        return values.reshape(self.shape, order="F" if self.fortran else "C")

    def rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the entries ``rows`` of the first axis: [len(rows), *shape[1:]]."""
        if self.fortran or not isinstance(self.data, Blob):
            return self.read()[rows]  # no data set stores images in Fortran's order
        stride = self.data.length // self.shape[0]
        data = b"".join(self.data.part(row * stride, stride).read() for row in rows.tolist())
        return np.frombuffer(data, self.dtype).reshape(len(rows), *self.shape[1:])


def open_blob(path: Path) -> Blob:
    """Open a whole file.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        file = _Descriptor(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})", remedy="mend its rights"
        ) from None
    return Blob(file, 0, os.fstat(file.number).st_size)


def spool(read: Callable[[int], bytes], packed: int, name: object, kind: str, bank: Path) -> Blob:
    """Write what ``read`` unpacks into a file beside ``bank``, where an import needs room anyway.

    The file has no name, so nothing is left behind however the process ends.

    Args:
        read: unpacks up to this number of bytes.
        packed: number of bytes that there are to unpack.
        name: the packed file, for messages.
        kind: of that file, as in ``whole``.
        bank: the folder of the bank.

    Raises:
        UserError: the file is damaged or unpacks to too much, or there is no room or no right.
    """

    def chunks() -> Iterator[bytes]:
        length = 0
        with whole(name, kind):
            while chunk := read(CHUNK):
                length += len(chunk)
                require_unpacked(length, packed)
                yield chunk

    folder = next(parent for parent in bank.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.writelines(chunks())
            file.flush()
            return Blob(_Descriptor(os.dup(file.fileno())), 0, file.tell())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot hold what is unpacked for the import ({error.strerror})",
            remedy="make room there, or set data.bank to another disk",
        ) from None


def require_unpacked(length: int, packed: int) -> None:
    """Check that ``packed`` bytes may unpack to ``length`` bytes; raises ``ValueError``."""
    if length > UNPACKED + PACKED_AT_MOST * packed:
        raise ValueError(f"{packed:,} bytes unpack to {length:,} or more, as no data do")


@contextlib.contextmanager
def whole(name: object, kind: str) -> Iterator[None]:
    """Report any exception of the block, but a ``UserError``, as damage of the file ``name``.

    The libraries that read these files have no list of the exceptions that damage raises.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)[:200]
        raise UserError(
            f"{name}: is not a whole {kind} ({reason})", remedy="get it again"
        ) from None
