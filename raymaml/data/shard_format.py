"""How episodes lie in a folder of shards: the manifest and the columns of the Arrow files.

``manifest.json`` describes the sampling; ``shard-00000.arrow``, ... are Arrow IPC files with the
columns ``index``, ``seed``, ``classes`` [N], ``support`` and ``support_labels`` [N*K], ``query``
and ``query_labels`` [N*Q] and, when materialised, ``support_pixels`` and ``query_pixels`` (uint8
[N*K, C, H, W] and [N*Q, C, H, W]; as in a bank, arrays of them have the axes [..., H, W, C]).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, StrictBool, model_validator

from raymaml.common.errors import Mistake
from raymaml.config.base import Count, PositiveInt, Section
from raymaml.config.schema import EpisodesConfig
from raymaml.data.arrow_file import read_header, tensor_column, tensor_type
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import ImageShape
from raymaml.data.sampling import EpisodeRows

SCHEMA_VERSION = 2
"""2: images stand in a random order, and their labels stand beside them."""
MANIFEST_FILE = "manifest.json"
REMEDY = "remove the folder and sample again with `raymaml data sample CONFIG`"
_MISSING = Mistake(
    "there are no episode shards here", "sample them with `raymaml data sample CONFIG`"
)
_MOST_IMAGES = 1 << 20
"""Maximum number of images of an episode; a manifest with more is not believed."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard: the episodes ``first .. first + count - 1``, size and checksum of its file."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.arrow$", max_length=40)]
    """Name in the folder of the manifest; nothing else can be named, least of all a path."""
    first: Count
    count: PositiveInt
    bytes: PositiveInt
    sha256: str


class Manifest(Section):
    """The content of a folder of shards, and how it was sampled."""

    schema_version: Literal[2] = 2
    bank_hash: str
    split: str
    spec: EpisodesConfig
    seed: Count
    count: PositiveInt
    materialized: StrictBool
    image_shape: ImageShape
    episodes_per_batch: PositiveInt
    shards: Annotated[tuple[ShardFile, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        counts = [shard.count for shard in self.shards]
        images = self.spec.num_ways * self.spec.images_per_class
        if [shard.first for shard in self.shards] != [0, *accumulate(counts)][:-1]:
            raise ValueError("its shards do not follow each other")
        if not sum(counts) == self.count == self.spec.num_episodes:
            raise ValueError(f"its shards hold {sum(counts)} episodes, not {self.count}")
        if images > _MOST_IMAGES:
            raise ValueError(f"an episode of {images} images")
        # Rows are never compressed, so that the files bound the number that a reader counts.
        if any(shard.count > shard.bytes for shard in self.shards):
            raise ValueError("a shard holds more episodes than bytes")
        return self


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest and the SHA-256 of its file.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    manifest, data = read_header(
        folder / MANIFEST_FILE, Manifest, SCHEMA_VERSION, missing=_MISSING, remedy=REMEDY
    )
    return manifest, hashlib.sha256(data).hexdigest()


def shard_schema(
    spec: EpisodesConfig, image_shape: tuple[int, int, int], *, materialized: bool
) -> pa.Schema:
    """Return the columns of the shards of ``spec``."""
    sizes = {"support": spec.num_ways * spec.num_shots, "query": spec.num_ways * spec.num_queries}
    label = pa.uint8() if spec.num_ways <= 256 else pa.int32()
    types: dict[str, Any] = {
        "index": pa.int64(),
        "seed": pa.int64(),
        "classes": pa.list_(pa.int32(), spec.num_ways),
    }
    types |= {name: pa.list_(pa.int32(), size) for name, size in sizes.items()}
    types |= {f"{name}_labels": pa.list_(label, size) for name, size in sizes.items()}
    if materialized:
        types |= {f"{name}_pixels": tensor_type((n, *image_shape)) for name, n in sizes.items()}
    return pa.schema(list(types.items()))


def episodes_table(
    episodes: Sequence[EpisodeRows], schema: pa.Schema, bank: ImageBank
) -> pa.RecordBatch:
    """Return episodes as rows of a shard; pixels, where ``schema`` has them, are the bank's."""
    columns = []
    for field in schema:
        values = [getattr(each, field.name.removesuffix("_pixels")) for each in episodes]
        if field.name.endswith("_pixels"):
            planes = np.moveaxis(bank.images(np.concatenate(values)), -1, 1)
            columns.append(tensor_column(planes.reshape(len(values), -1, *bank.image_shape)))
        elif pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.concatenate(values), field.type.value_type)
            columns.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
        else:
            columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


def read_rows(table: pa.Table) -> list[EpisodeRows]:
    """Return the episodes that the rows of a shard's table hold."""
    columns = {name: table.column(name).to_pylist() for name in ("index", "seed")}
    lists = ("classes", "support", "support_labels", "query", "query_labels")
    columns |= {name: _matrix(table, name) for name in lists}
    return [
        EpisodeRows(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def read_pixels(table: pa.Table) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return support [E, N*K, H, W, C] and query [E, N*Q, H, W, C] of a materialised table.

    The arrays are read-only views where the table is one chunk.
    """
    support, query = (
        np.moveaxis(_one_chunk(table, name).to_numpy_ndarray(), -3, -1)
        for name in ("support_pixels", "query_pixels")
    )
    return support, query


def row_problem(
    table: pa.Table, first: int, bank: ImageBank, spec: EpisodesConfig, split: str
) -> str | None:
    """Return the problem of a table that begins with episode ``first``; None if it is right.

    A checksum shows that a file is as it was written, not that its writer can be trusted: an
    episode could name a row outside its class, or outside the bank.
    """
    count = len(table)
    if not np.array_equal(table["index"].to_numpy(), np.arange(first, first + count)):
        return f"its episodes are not {first} to {first + count - 1}"
    classes = _matrix(table, "classes")  # [E, N]
    checks = {
        f"classes that are not of split {split}": ~np.isin(classes, bank.class_ids(split)),
        "a class twice": np.diff(np.sort(classes, axis=1), axis=1) == 0,
    }
    known = classes.clip(0, len(bank.classes) - 1)
    for name, images in (("support", spec.num_shots), ("query", spec.num_queries)):
        rows, labels = _matrix(table, name), _matrix(table, f"{name}_labels")  # [E, N*images]
        wanted = np.repeat(np.arange(spec.num_ways), images)
        checks[f"{name} labels that are not 0 to {spec.num_ways - 1}, {images} of each"] = (
            np.sort(labels, axis=1) != wanted
        )
        owners = np.take_along_axis(known, labels.clip(0, spec.num_ways - 1), 1)
        checks[f"{name} rows that are not of their class"] = (rows < bank.first_row[owners]) | (
            rows >= bank.first_row[owners + 1]
        )
    for text, wrong in checks.items():
        if wrong.any():
            bad = int(np.flatnonzero(wrong.reshape(count, -1).any(axis=1))[0])
            return f"episode {first + bad} has {text}"
    return None


def _matrix(table: pa.Table, name: str) -> NDArray[np.int64]:
    """Return a column of fixed-size lists as [rows, length]."""
    column = _one_chunk(table, name)
    flat = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return cast("NDArray[np.int64]", flat.astype(np.int64))


def _one_chunk(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def cut(tables: Iterator[pa.Table], counts: Iterable[int]) -> Iterator[pa.Table | None]:
    """Yield consecutive pieces of ``counts`` rows, across the tables; None for a count of 0.

    Raises:
        RuntimeError: the tables end before the counts do.
    """
    ahead: list[pa.Table] = []
    rows = 0
    for count in counts:
        while rows < count:
            table = next(tables, None)
            if table is None:
                raise RuntimeError(f"the stream ended with {rows} of {count} rows wanted")
            ahead.append(table)
            rows += len(table)
        if count == 0:
            yield None
            continue
        joined = ahead[0] if len(ahead) == 1 else pa.concat_tables(ahead)
        yield joined.slice(0, count)
        ahead, rows = [joined.slice(count)], rows - count
