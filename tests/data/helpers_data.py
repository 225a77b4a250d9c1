"""Small banks for tests, and where the published files lie that some of them compare with."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import ClassImages, in_memory
from raymaml.data.sampling import EpisodeRows

SHARED = Path(__file__).resolve().parents[3] / "shared"
LISTS = SHARED / "data" / "splits"


FOLDER_CONFIG = """name: x
data:
  source: {{kind: image-folder, path: {folder}/in}}
  bank: {folder}/bank
  shards: {folder}/shards
  image_size: 8
episodes:
  train: &spec {{num_ways: 2, num_shots: 1, num_queries: 1, num_episodes: 2}}
  val: *spec
  test: *spec
outer: {{num_steps: 1}}
"""
"""A config for what ``write_class_folders`` writes into ``{folder}/in``."""


def write_class_folders(folder: Path, first: str = "a", second: str = "b") -> None:
    """Write ``<split>/<class>/<image>``: two classes a split, named apart, of two 8x8 pictures,
    each of another shade.

    Args:
        folder: of the splits.
        first, second: how the classes of the train split begin; elsewhere they are a and b.
    """
    shades = iter(range(12))
    for split in ("train", "val", "test"):
        for name in (first, second) if split == "train" else ("a", "b"):
            for image in range(2):
                path = folder / split / f"{name}{split}" / f"{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), next(shades)).save(path)


def make_classes(
    counts: dict[str, list[int]], size: int = 4, channels: int = 1, seed: int = 0
) -> list[ClassImages]:
    """Random classes: ``counts`` gives each split's images per class."""
    generator = np.random.default_rng(seed)
    return [
        in_memory(
            f"{split}-{number}",
            split,
            generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
        )
        for split, sizes in counts.items()
        for number, count in enumerate(sizes)
    ]


def make_bank(
    folder: Path, counts: dict[str, list[int]], size: int = 4, channels: int = 1, seed: int = 0
) -> ImageBank:
    return write_bank(
        folder,
        make_classes(counts, size, channels, seed),
        source="random",
        licence="none",
        image_shape=(channels, size, size),
    )


def rewritten(data: bytes, change: Callable[[pa.Table], pa.Table], **options: Any) -> bytes:
    """An Arrow file whose batches ``change`` has changed."""
    reader = pa.ipc.open_file(pa.py_buffer(data))
    tables = [
        change(pa.Table.from_batches([reader.get_batch(i)]))
        for i in range(reader.num_record_batches)
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(
        sink, tables[0].schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(tables[0].schema))
    return sink.getvalue().to_pybytes()


def with_entry(table: pa.Table, name: str, value: Any, row: int = 0, place: int = 0) -> pa.Table:
    """A table with one number of a column, or of a list in it, replaced."""
    values = table.column(name).to_pylist()
    row %= len(values)
    if isinstance(values[row], list):
        values[row][place % len(values[row])] = value
    else:
        values[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def spec_of(ways: int, shots: int, queries: int, episodes: int) -> EpisodesConfig:
    return EpisodesConfig(
        num_ways=ways, num_shots=shots, num_queries=queries, num_episodes=episodes
    )


def as_lists(rows: EpisodeRows) -> list[object]:
    return [
        value.tolist() if isinstance(value, np.ndarray) else value for value in vars(rows).values()
    ]


def tiff(values: NDArray[Any]) -> bytes:
    """A TIFF of any kind of number, [H, W] or [H, W, 3]; its writer knows none of Pillow."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags: list[tuple[int, str, list[int]]] = [
        *((256, "H", [width]), (257, "H", [height])),
        (258, "H", [values.itemsize * 8] * channels),  # bits a sample
        *((259, "H", [1]), (262, "H", [2 if channels == 3 else 1])),  # no compression; meaning
        *((273, "I", [8]), (277, "H", [channels]), (278, "H", [height]), (279, "I", [len(data)])),
        (339, "H", [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
    ]
    start = 8 + len(data)
    behind = start + 2 + 12 * len(tags) + 4
    entries = long = b""
    for number, kind, items in tags:
        content = struct.pack(f"<{len(items)}{kind}", *items)
        if len(content) > 4:
            content, long = struct.pack("<I", behind + len(long)), long + content
        entries += struct.pack("<HHI", number, 3 if kind == "H" else 4, len(items))
        entries += content.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", start)
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4) + long


def png(values: NDArray[Any], colour: int) -> bytes:
    """A PNG of 16 bits a value; its writer knows none of Pillow."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return raw_png(width, height, 16, colour, rows)


def raw_png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    """A PNG made by hand: whatever size it claims, and whatever its data are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
