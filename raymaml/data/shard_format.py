"""How episodes lie in a folder of shards: the manifest and the columns of the Arrow files.

``manifest.json`` says what was sampled; ``shard-00000.arrow``, ... are Arrow IPC files with the
columns ``index``, ``seed``, ``classes`` [N], ``support`` and ``support_labels`` [N*K], ``query``
and ``query_labels`` [N*Q] and, when materialised, ``support_pixels`` and ``query_pixels`` (uint8
[N*K, C, H, W] and [N*Q, C, H, W]; as in a bank, arrays of them have the axes [..., H, W, C]).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, StrictBool, TypeAdapter, ValidationError

from raymaml.common.errors import UserError
from raymaml.common.untrusted import checked, first_problem, parse_json, shortened
from raymaml.config.base import Count, PositiveInt
from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank_format import ImageShape
from raymaml.data.sampling import EpisodeRows
from raymaml.data.tables import tensor_type
from raymaml.storage.files import sha256_of_file

SCHEMA_VERSION = 2
"""2: images stand in a random order, and their labels stand beside them."""
MANIFEST_FILE = "manifest.json"
REMEDY = "remove the folder and sample again with `raymaml data sample CONFIG`"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard: the episodes ``first .. first + count - 1``, size and checksum of its file."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.arrow$", max_length=40)]
    """Name in the folder of the manifest; nothing else can be named, least of all a path."""
    first: Count
    count: PositiveInt
    bytes: PositiveInt
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds and how it was sampled."""

    schema_version: int
    bank_hash: str
    split: str
    spec: dict[str, Annotated[int, Field(strict=True)]]
    seed: Count
    count: PositiveInt
    materialized: StrictBool
    image_shape: ImageShape
    episodes_per_batch: PositiveInt
    shards: Annotated[tuple[ShardFile, ...], Field(min_length=1)]


_MANIFEST = TypeAdapter(Manifest)
_LISTS = ("classes", "support", "support_labels", "query", "query_labels")
_MOST_IMAGES = 1 << 20
"""Of an episode that is believed."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder that is not in use yet."""
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest and the SHA-256 of its file.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: there are no episode shards here ({error.strerror})",
            remedy="sample them with `raymaml data sample CONFIG`",
        ) from None
    try:
        tree = parse_json(data)
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema_version is {shortened(version)}, this program reads"
                f" {SCHEMA_VERSION}",
                remedy=REMEDY,
            )
        manifest = checked(_MANIFEST, tree)
        if reason := _contradiction(manifest):
            raise ValueError(reason)
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})", remedy=REMEDY) from None
    return manifest, hashlib.sha256(data).hexdigest()


def _contradiction(manifest: Manifest) -> str | None:
    """Say what a manifest says that cannot be."""
    try:
        spec = EpisodesConfig.model_validate(manifest.spec)
    except ValidationError as error:
        return f"spec: {first_problem(error)}"
    counts = [shard.count for shard in manifest.shards]
    firsts = [0, *accumulate(counts)][: len(counts)]
    if [shard.first for shard in manifest.shards] != firsts:
        return "its shards do not follow each other"
    if not sum(counts) == manifest.count == spec.num_episodes:
        return f"its shards hold {sum(counts)} episodes, not {manifest.count}"
    if spec.num_ways * spec.images_per_class > _MOST_IMAGES:
        return f"an episode of {spec.num_ways * spec.images_per_class} images"
    # Rows are never compressed, so that the files bound what a reader can be made to count.
    if any(shard.count > shard.bytes for shard in manifest.shards):
        return "a shard holds more episodes than bytes"
    return None


def check_shard_file(path: Path, shard: ShardFile, *, verify: bool) -> None:
    """Check that the file of a shard is whole; ``verify`` compares the checksum too.

    Raises:
        UserError: it is missing, truncated or altered.
    """
    if not path.is_file():
        raise UserError(f"{path}: is missing", remedy=REMEDY)
    if (size := path.stat().st_size) != shard.bytes:
        problem = f"{path}: is truncated or altered ({size} bytes, not {shard.bytes})"
        raise UserError(problem, remedy=REMEDY)
    if verify and sha256_of_file(path) != shard.sha256:
        raise UserError(f"{path}: is altered (its SHA-256 is not the manifest's)", remedy=REMEDY)


def shard_schema(
    spec: EpisodesConfig, image_shape: tuple[int, int, int], *, materialized: bool
) -> pa.Schema:
    """Return the columns of the shards of ``spec``."""
    lengths = {
        "classes": spec.num_ways,
        "support": spec.num_ways * spec.num_shots,
        "query": spec.num_ways * spec.num_queries,
    }
    types: dict[str, Any] = {"index": pa.int64(), "seed": pa.int64()}
    types |= {name: pa.list_(pa.int32(), length) for name, length in lengths.items()}
    label = label_type(spec.num_ways)
    types |= {f"{name}_labels": pa.list_(label, lengths[name]) for name in ("support", "query")}
    if materialized:
        for name in ("support", "query"):
            types[f"{name}_pixels"] = tensor_type((lengths[name], *image_shape))
    return pa.schema(list(types.items()))


def label_type(num_ways: int) -> pa.DataType:
    """Return the type of the labels 0..N-1 in a shard."""
    return pa.uint8() if num_ways <= 256 else pa.int32()


def row_columns(episodes: Sequence[EpisodeRows]) -> list[pa.Array]:
    """Return the columns of row numbers and labels, in the order of ``shard_schema``."""
    label = label_type(len(episodes[0].classes))
    return [
        pa.array([episode.index for episode in episodes], pa.int64()),
        pa.array([episode.seed for episode in episodes], pa.int64()),
        _fixed_lists([episode.classes for episode in episodes]),
        _fixed_lists([episode.support for episode in episodes]),
        _fixed_lists([episode.query for episode in episodes]),
        _fixed_lists([episode.support_labels for episode in episodes], label),
        _fixed_lists([episode.query_labels for episode in episodes], label),
    ]


def read_rows(table: pa.Table | pa.RecordBatch) -> list[EpisodeRows]:
    """Return the episodes that the rows of a shard's table hold."""
    numbers = {name: table.column(name).to_pylist() for name in ("index", "seed")}
    lists = {name: matrix(table, name) for name in _LISTS}
    columns = numbers | lists
    return [
        EpisodeRows(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def read_pixels(table: pa.Table | pa.RecordBatch) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return support [E, N*K, H, W, C] and query [E, N*Q, H, W, C] of a materialised table.

    The arrays are read-only views where the table is one chunk.
    """
    return (
        np.moveaxis(_one_chunk(table, "support_pixels").to_numpy_ndarray(), -3, -1),
        np.moveaxis(_one_chunk(table, "query_pixels").to_numpy_ndarray(), -3, -1),
    )


def _fixed_lists(arrays: list[NDArray[np.int64]], kind: pa.DataType | None = None) -> pa.Array:
    values = pa.array(np.concatenate(arrays), kind or pa.int32())
    return pa.FixedSizeListArray.from_arrays(values, len(arrays[0]))


def matrix(table: pa.Table | pa.RecordBatch, name: str) -> NDArray[np.int64]:
    """Return a column of fixed-size lists as [rows, length]."""
    column = _one_chunk(table, name)
    flat = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return cast("NDArray[np.int64]", flat.astype(np.int64))


def _one_chunk(table: pa.Table | pa.RecordBatch, name: str) -> Any:
    column = table.column(name)
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
