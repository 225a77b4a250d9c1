"""One array of an ``.npz`` file, read row by row whatever its size.

An npz is a zip of npy files. A stored member is read in place; a compressed one is unpacked beside
the bank when an import needs its first row.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymaml.common.errors import UserError
from raymaml.data.formats.spool import (
    StoredArray,
    open_blob,
    require_unpacked,
    spool,
    unpack,
    whole,
)

_LOCAL_HEADER = 30  # bytes of a zip's local file header before the name (APPNOTE.TXT 4.3.7)


@dataclass(frozen=True)
class NpzArray:
    """An array of an npz file: its header is read, its values are not."""

    path: Path
    member: zipfile.ZipInfo
    header_length: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    def open(self, bank: Path) -> StoredArray:
        """Open the values; data unpacked beside ``bank`` for them last as long as they do.

        Raises:
            UserError: the file is damaged, or there is no room to unpack it.
        """
        length = math.prod(self.shape) * self.dtype.itemsize
        with whole(self.path, "npz file"):
            require_unpacked(self.member.file_size, self.member.compress_size)
            if self.member.compress_type == zipfile.ZIP_STORED:
                data = open_blob(self.path).part(self._place(), length)
            else:
                data = spool(self._unpacked(), bank)
            if data.length != length:
                raise EOFError("the data end too early")
        return StoredArray(data, self.dtype, self.shape, self.fortran)

    def _place(self) -> int:
        """Return where the values of a stored member begin in the file."""
        start = self.member.header_offset
        header = open_blob(self.path).part(start, _LOCAL_HEADER).read()
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return start + _LOCAL_HEADER + name + extra + self.header_length

    def _unpacked(self) -> Iterator[bytes]:
        with (
            whole(self.path, "npz file"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.member) as stream,
        ):
            stream.read(self.header_length)
            yield from unpack(stream.read, self.member.compress_size)


def open_npz(path: Path, key: str) -> NpzArray | None:
    """Open the array ``key`` of an npz file; None where there is no such array.

    Raises:
        UserError: the file is damaged, or declares more values than it holds.
    """
    with whole(path, "npz file"), zipfile.ZipFile(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            return None
        member = archive.getinfo(f"{key}.npy")
        with archive.open(member) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers that Python 2 wrote
            version = "1_0" if np.lib.format.read_magic(stream) == (1, 0) else "2_0"
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}")(stream)
            header_length = stream.tell()
    if dtype.hasobject or header_length + math.prod(shape) * dtype.itemsize != member.file_size:
        raise UserError(
            f"{path}: {key} is declared as {dtype!s:.100} {shape!s:.100}, but {member.file_size}"
            " bytes are there (arrays of objects are refused)",
            remedy="get the file again",
        )
    return NpzArray(path, member, header_length, dtype, shape, fortran)
