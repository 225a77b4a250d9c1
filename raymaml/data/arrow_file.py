"""Arrow files whose content is not believed: mapped, and checked batch by batch.

pyarrow checks the structure of a file, but it unpacks compressed batches to whatever length they
claim. We never compress, so a batch that is compressed is refused before pyarrow sees it. For that
two flags have to be read from the file's own metadata, which are FlatBuffers (File.fbs and
Message.fbs of the Arrow format).
"""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa

_MAGIC = b"ARROW1"
_DICTIONARIES, _RECORD_BATCHES = 2, 3  # fields of the footer
_HEADER = 2  # field of a message
_COMPRESSION = 3  # field of a record batch
_BLOCK_BYTES = 24  # offset int64, length of the metadata int32, padding, length of the body int64
_CONTINUES = 0xFFFFFFFF


class ArrowFile:
    """A mapped Arrow IPC file of a known schema, without nulls, dictionaries and compression."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Map the file and look at its footer.

        Raises:
            ValueError: it is no such file.
        """
        try:
            with pa.memory_map(str(path)) as source:
                self._bytes = source.read_buffer()
            self._reader = pa.ipc.open_file(self._bytes)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"it is no Arrow file: {error}") from None
        if not self._reader.schema.equals(schema):
            raise ValueError("it has other columns")
        self._blocks = _blocks(memoryview(self._bytes))

    @property
    def num_batches(self) -> int:
        """Number of record batches."""
        return len(self._blocks)

    def batch(self, number: int, num_rows: int) -> pa.RecordBatch:
        """Return a record batch: views of the mapped file.

        Raises:
            ValueError: it is damaged, or has not ``num_rows`` rows.
        """
        if not 0 <= number < self.num_batches:
            raise ValueError(f"it has {self.num_batches} batches, needed is number {number}")
        if _is_compressed(memoryview(self._bytes), self._blocks[number]):
            raise ValueError(f"batch {number} is compressed")
        try:
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"batch {number}: {error}") from None
        if batch.num_rows != num_rows:
            raise ValueError(f"batch {number} has {batch.num_rows} rows, not {num_rows}")
        if any(column.null_count for column in batch.columns):
            raise ValueError(f"batch {number} has nulls")
        return batch


def _blocks(file: memoryview) -> list[int]:
    """Return where the message of each record batch begins.

    Raises:
        ValueError: the footer makes no sense, or names dictionaries, which pyarrow would read.
    """
    try:
        (length,) = struct.unpack_from("<i", file, len(file) - len(_MAGIC) - 4)
        footer = file[len(file) - len(_MAGIC) - 4 - length : len(file) - len(_MAGIC) - 4]
        root = _follow(footer, 0)
        if (place := _field(footer, root, _DICTIONARIES)) and _vector(footer, place)[1]:
            raise ValueError("it has dictionaries")
        place = _field(footer, root, _RECORD_BATCHES)
        start, count = _vector(footer, place) if place else (0, 0)
        vector = footer[start : start + count * _BLOCK_BYTES]
        return [offset for offset, _, _ in struct.iter_unpack("<qi4xq", vector)]
    except struct.error as error:
        raise ValueError(f"its footer is damaged: {error}") from None


def _is_compressed(file: memoryview, start: int) -> bool:
    """Tell whether the record batch whose message begins at ``start`` is compressed."""
    try:
        (first,) = struct.unpack_from("<I", file, start)
        message = file[start + (8 if first == _CONTINUES else 4) :]
        header = _field(message, _follow(message, 0), _HEADER)
        return bool(header and _field(message, _follow(message, header), _COMPRESSION))
    except struct.error as error:
        raise ValueError(f"the metadata of a batch is damaged: {error}") from None


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
