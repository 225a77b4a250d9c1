"""Arrow files whose content is not believed: mapped, and checked batch by batch.

pyarrow checks the structure of a file, but it unpacks compressed batches to whatever length they
claim. We never compress, so a batch that is compressed is refused before pyarrow sees it. For that
two flags have to be read from the file's own metadata, which are FlatBuffers (File.fbs and
Message.fbs of the Arrow format).
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from raymaml.common.errors import Mistake, UserError
from raymaml.common.untrusted import checked, parse_json, shortened

Header = TypeVar("Header")

_MAGIC = b"ARROW1"
_DICTIONARIES, _RECORD_BATCHES = 2, 3  # fields of the footer
_HEADER = 2  # field of a message
_COMPRESSION = 3  # field of a record batch
_BLOCK_BYTES = 24  # offset int64, length of the metadata int32, padding, length of the body int64
_CONTINUES = 0xFFFFFFFF


@contextlib.contextmanager
def intact(path: Path, remedy: str) -> Iterator[None]:
    """Report a ``ValueError`` or an error of Arrow in the block as damage of the file ``path``."""
    try:
        yield
    except (ValueError, struct.error, pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is damaged ({error})", remedy=remedy) from None


def read_header(
    path: Path, kind: type[Header], version: int, *, missing: Mistake, remedy: str
) -> tuple[Header, bytes]:
    """Return the header of a bank or of shards, and the bytes of its file.

    Args:
        path: the JSON file.
        kind: the header's model.
        version: the ``schema_version`` that it must have.
        missing: reported where there is no file that can be read.
        remedy: for a file that is damaged, or of another version.

    Raises:
        UserError: one of these.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = f"{path}: {missing.problem} ({error.strerror})"
        raise UserError(problem, remedy=missing.remedy) from None
    try:
        tree = parse_json(data)
    except ValueError:
        raise UserError(f"{path}: is damaged (not JSON)", remedy=remedy) from None
    with intact(path, remedy):
        found = tree.get("schema_version") if isinstance(tree, dict) else None
        if found == version:
            return checked(TypeAdapter(kind), tree), data
    raise UserError(
        f"{path}: schema_version is {shortened(found)}, this program reads {version}", remedy=remedy
    )


def require_size(path: Path, size: int, remedy: str) -> None:
    """Check that a file is there and has ``size`` bytes; raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path}: is missing", remedy=remedy)
    if (found := path.stat().st_size) != size:
        raise UserError(
            f"{path}: is truncated or altered ({found} bytes, must be {size})", remedy=remedy
        )


class ArrowFile:
    """A mapped Arrow IPC file of a known schema, without nulls, dictionaries and compression."""

    def __init__(self, path: Path, schema: pa.Schema, remedy: str) -> None:
        """Map the file and check its footer.

        Raises:
            UserError: it is no such file; ``remedy`` ends this message and those of ``batch``.
        """
        self._path, self._remedy = path, remedy
        with intact(path, remedy):
            with pa.memory_map(str(path)) as source:
                self._bytes = source.read_buffer()
            self._reader = pa.ipc.open_file(self._bytes)
            if not self._reader.schema.equals(schema):
                raise ValueError("it has other columns")
            self._starts = _batch_starts(memoryview(self._bytes))

    @property
    def num_batches(self) -> int:
        """Number of record batches."""
        return len(self._starts)

    def batch(self, number: int, num_rows: int) -> pa.RecordBatch:
        """Return a record batch: views of the mapped file.

        Raises:
            UserError: it is damaged, or has not ``num_rows`` rows.
        """
        with intact(self._path, self._remedy):
            if not 0 <= number < self.num_batches:
                raise ValueError(f"it has {self.num_batches} batches, needed is number {number}")
            if _is_compressed(memoryview(self._bytes), self._starts[number]):
                raise ValueError(f"batch {number} is compressed")
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
            if batch.num_rows != num_rows:
                raise ValueError(f"batch {number} has {batch.num_rows} rows, not {num_rows}")
            if any(column.null_count for column in batch.columns):
                raise ValueError(f"batch {number} has nulls")
            return batch


def tensor_type(shape: Sequence[int]) -> pa.DataType:
    """Return the type of a column whose entries are uint8 tensors of ``shape``."""
    return pa.fixed_shape_tensor(pa.uint8(), list(shape))


def tensor_column(tensors: NDArray[np.uint8]) -> pa.Array:
    """Return an array [n, ...] as a column of n tensors; a contiguous array is not copied."""
    # FixedShapeTensorArray.from_numpy_ndarray derives the order of the axes from their strides,
    # which axes of length one leave open.
    shape = tensors.shape[1:]
    flat = pa.array(np.ascontiguousarray(tensors).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(tensor_type(shape), storage)


def _batch_starts(file: memoryview) -> list[int]:
    """Return where the message of each record batch begins.

    Raises:
        ValueError: the file names dictionaries, which pyarrow would read.
        struct.error: the footer makes no sense.
    """
    (length,) = struct.unpack_from("<i", file, len(file) - len(_MAGIC) - 4)
    footer = file[len(file) - len(_MAGIC) - 4 - length : len(file) - len(_MAGIC) - 4]
    root = _follow(footer, 0)
    if (place := _field(footer, root, _DICTIONARIES)) and _vector(footer, place)[1]:
        raise ValueError("it has dictionaries")
    place = _field(footer, root, _RECORD_BATCHES)
    start, count = _vector(footer, place) if place else (0, 0)
    vector = footer[start : start + count * _BLOCK_BYTES]
    return [offset for offset, _, _ in struct.iter_unpack("<qi4xq", vector)]


def _is_compressed(file: memoryview, start: int) -> bool:
    """Return whether the record batch whose message begins at ``start`` is compressed."""
    (first,) = struct.unpack_from("<I", file, start)
    message = file[start + (8 if first == _CONTINUES else 4) :]
    header = _field(message, _follow(message, 0), _HEADER)
    return bool(header and _field(message, _follow(message, header), _COMPRESSION))


def _follow(data: memoryview, place: int) -> int:
    """Return the place that the offset at ``place`` leads to."""
    (offset,) = struct.unpack_from("<I", data, place)
    return int(place + offset)


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Return where a field of the table at ``table`` stands; None where it is left out."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    if 4 + 2 * number + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", data, table - back + 4 + 2 * number)
    return table + offset if offset else None


def _vector(data: memoryview, place: int) -> tuple[int, int]:
    """Return where the entries of a vector begin, and their number."""
    start = _follow(data, place)
    (count,) = struct.unpack_from("<I", data, start)
    return start + 4, int(count)
