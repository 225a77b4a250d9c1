"""One array of an ``.npz`` file, read row by row whatever its size.

An npz is a zip of npy files. A stored member is read in place; a compressed one is unpacked beside
the bank when an import needs its first row.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raymaml.common.errors import UserError
from raymaml.data.formats.spool import StoredArray, open_blob, require_unpacked, spool, whole

_LOCAL_HEADER = 30  # bytes of a zip's local file header before the name (APPNOTE.TXT 4.3.7)


@dataclass(frozen=True)
class NpzArray:
    """An array of an npz file: its header is read, its values are not."""

    path: Path
    member: zipfile.ZipInfo
    header_length: int
    without_values: StoredArray

    def open(self, bank: Path) -> StoredArray:
        """Open the values; data unpacked beside ``bank`` for them last as long as they do.

        Raises:
            UserError: the file is damaged, or there is no room to unpack it.
        """
        length = self.member.file_size - self.header_length
        packed, file = self.member.compress_size, open_blob(self.path)
        with whole(self.path, "npz file"), zipfile.ZipFile(self.path) as archive:
            require_unpacked(self.member.file_size, packed)
            if self.member.compress_type == zipfile.ZIP_STORED:
                start = self.member.header_offset
                header = file.part(start, _LOCAL_HEADER).read()
                name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                data = file.part(start + _LOCAL_HEADER + name + extra + self.header_length, length)
            else:
                with archive.open(self.member) as stream:
                    stream.read(self.header_length)
                    data = spool(stream.read, packed, self.path, "npz file", bank)
            if data.length != length:
                raise EOFError("the data end too early")
        return replace(self.without_values, data=data)


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
    return NpzArray(path, member, header_length, StoredArray(b"", dtype, shape, fortran))
