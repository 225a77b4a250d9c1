"""One array of an ``.npz`` file, read row by row whatever its size.

An npz is a zip of npy files. A member that is stored as it is can be read in place; a compressed
one is unpacked beside the bank when its first row is asked for.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from raymaml.common.errors import UserError, reason_of
from raymaml.data.importers.stored import (
    Blob,
    Scratch,
    StoredArray,
    chunks_of,
    open_blob,
    require_unpacked,
)

_LOCAL_HEADER = 30  # bytes of a zip's local file header before the name (APPNOTE.TXT 4.3.7)


@dataclass(frozen=True)
class NpzArray:
    """An array of an npz file: its header is read, its values are not."""

    path: Path
    member: zipfile.ZipInfo
    scratch: Scratch
    header_length: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    def open(self) -> StoredArray:
        """Open the values, unpacked first where they are compressed; that lasts while they do.

        Raises:
            UserError: the file is damaged, or there is no room to unpack it.
        """
        length = math.prod(self.shape) * self.dtype.itemsize
        try:
            require_unpacked(self.member.file_size, self.member.compress_size)
            if self.member.compress_type == zipfile.ZIP_STORED:
                data = Blob(open_blob(self.path).file, self._place(), length)
            else:
                data = self.scratch.new_file().append(self._unpack())
            if data.length != length:
                raise EOFError("the data end too early")
        except UserError:
            raise
        except Exception as error:  # zipfile has no list of what it raises on damage
            raise _damaged(self.path, error) from None
        return StoredArray(data, self.dtype, self.shape, self.fortran)

    def _place(self) -> int:
        """Return where the values of a stored member begin in the file."""
        whole = open_blob(self.path)
        header = whole.file.read(self.member.header_offset, _LOCAL_HEADER)
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return self.member.header_offset + _LOCAL_HEADER + name + extra + self.header_length

    def _unpack(self) -> Iterator[bytes]:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            stream.read(self.header_length)
            yield from chunks_of(stream.read)


def open_npz(path: Path, key: str, scratch: Scratch) -> NpzArray | None:
    """Open the array ``key`` of an npz file; None where there is no such array.

    Raises:
        UserError: the file is damaged, or declares more values than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                return None
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as stream:
                shape, fortran, dtype = _header(stream)
                header_length = stream.tell()
    except Exception as error:  # neither zipfile nor numpy has a list
        raise _damaged(path, error) from None
    declared = header_length + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or declared != member.file_size:
        raise UserError(
            f"{path}: {key} is declared as {dtype!s:.100} {shape!s:.100}, but {member.file_size}"
            " bytes are there (arrays of objects are refused); get the file again"
        )
    return NpzArray(path, member, scratch, header_length, dtype, shape, fortran)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on headers that Python 2 wrote
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is not a whole npz file ({reason_of(error)[:200]}); get it again")
