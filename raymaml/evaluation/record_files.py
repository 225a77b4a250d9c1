"""Files of records: one Parquet file a chunk.

A chunk is a run of consecutive episodes. The schema metadata of its file holds the identity of what
was judged: weights, episodes, settings. Files appear whole or not at all, so that a campaign that
was killed judges only the chunks without a file. The records do not show how the episodes were cut
into chunks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from raymaml.common.errors import StorageError, UserError, gathered, storage_error
from raymaml.common.untrusted import checked, parse_json
from raymaml.evaluation.records import (
    Record,
    column_problem,
    identity_of,
    records_table,
    value_problem,
    with_predictions,
)
from raymaml.storage.files import reaching, read_bytes, replacing
from raymaml.storage.place import Place

_CIRCUMSTANCES = b"circumstances"
_UNPACKED, _PACKED_AT_MOST = 64 << 20, 200
"""Bytes that a file may unpack to whatever its length, and times its length beyond."""
_LONGEST_SHOWN = 1000
_TEXTS = TypeAdapter(dict[str, str])
_REMEDY = "move it away and run `raymaml test` again, which judges only what is missing"


def chunk_path(folder: Place, first: int, count: int) -> Place:
    """Name the file of episodes ``first`` to ``first + count - 1``."""
    return folder / f"episodes-{first:08d}-{first + count - 1:08d}.parquet"


def write_chunk(
    path: Place,
    records: Sequence[Record],
    identity: Mapping[str, str],
    circumstances: Mapping[str, str] | None = None,
) -> None:
    """Write the records of one chunk to ``path``, atomically.

    ``identity`` goes with them and is compared whenever they are read; so do ``circumstances``,
    such as the hardware, in which chunks of one campaign may differ.

    Raises:
        ValueError: when there are no records, their episodes are not consecutive, or they differ
            in the number of inner steps or ways.
    """
    about = json.dumps(dict(circumstances or {}), sort_keys=True)
    table = records_table(records).replace_schema_metadata(
        {**identity, _CIRCUMSTANCES.decode(): about}
    )
    with replacing(path) as file:
        pq.write_table(table, file, write_page_checksum=True)


def missing_chunks(
    folder: Place, num_episodes: int, chunk_size: int, identity: Mapping[str, str]
) -> list[range]:
    """Cut the episodes that no complete chunk in ``folder`` holds into chunks.

    The chunks found may be of any size: the rest is cut by ``chunk_size``, which may change while a
    campaign goes on, as may the number of episodes.
    """
    judged, _ = recorded(folder, identity)
    missing = np.setdiff1d(np.arange(num_episodes), judged)
    return [
        range(start, min(start + chunk_size, hole.stop))
        for hole in _runs(missing)
        for start in range(hole.start, hole.stop, chunk_size)
    ]


def read_records(
    folder: Place,
    num_episodes: int | None = None,
    identity: Mapping[str, str] | None = None,
) -> pa.Table:
    """Read the chunks of a folder as one table sorted by episode.

    Given ``num_episodes``, the table holds exactly episodes 0 to ``num_episodes - 1`` (later ones
    are left out); given ``identity``, every chunk must carry it. The table's own identity is
    ``identity_of(table)``.

    Raises:
        UserError: when there is no chunk, and for every chunk that cannot be read, has another
            identity or overlaps another, and for every hole.
    """
    paths = _chunk_files(folder)
    if not paths:
        raise UserError(f"{folder}: holds no record files", remedy="run `raymaml test` first")
    chunks: dict[Place, pa.Table] = {}
    with gathered() as mistakes:
        for path in paths:
            with mistakes.kept():
                chunks[path] = read_chunk(path)
    chunks = dict(sorted(chunks.items(), key=lambda item: int(_episodes(item[1])[0])))
    reference = next(iter(chunks.values())).schema
    if identity is not None:
        reference = reference.with_metadata(dict(identity))
    with gathered() as mistakes:
        for path, table in chunks.items():
            if not table.schema.equals(reference, check_metadata=True):
                mistakes.add(f"{path}: {_difference(table.schema, reference)}", remedy=_REMEDY)
        for problem in _overlaps(chunks):
            mistakes.add(problem, remedy=_REMEDY)
        if num_episodes is not None:
            present = np.concatenate([_episodes(table) for table in chunks.values()])
            for hole in _runs(np.setdiff1d(np.arange(num_episodes), present)):
                mistakes.add(
                    f"{folder}: no record of episodes {hole.start} to {hole.stop - 1}",
                    remedy="run `raymaml test` again, which judges only what is missing",
                )
    table = pa.concat_tables(chunks.values()).combine_chunks()
    return table if num_episodes is None else table.slice(0, num_episodes)


def read_circumstances(folder: Place) -> list[dict[str, str]]:
    """Return the different circumstances in which the whole chunks of a folder were judged."""
    texts: set[bytes] = set()
    for path in _chunk_files(folder):
        with suppress(OSError, ValueError, pa.ArrowException):
            source = pa.BufferReader(read_bytes(path))
            texts.add((pq.read_schema(source).metadata or {}).get(_CIRCUMSTANCES, b"{}"))
    found = []
    for text in sorted(texts):
        with suppress(ValueError):  # a line about hardware is nothing to refuse records for
            found.append(checked(_TEXTS, parse_json(text)))
    return found


def leading_accuracies(folder: Place, identity: Mapping[str, str]) -> NDArray[np.float64]:
    """Return the accuracies of episodes 0, 1, .. up to the first that has no record: [n]."""
    episodes, accuracies = recorded(folder, identity)
    return accuracies[: np.count_nonzero(episodes == np.arange(len(episodes)))]


def recorded(
    folder: Place, identity: Mapping[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the episodes of all complete chunks of this identity, sorted, and their accuracies.

    Files that are torn, or of another identity, count as missing.
    """
    episodes, accuracies = [np.empty(0, np.int64)], [np.empty(0)]
    for path in _chunk_files(folder):
        try:
            table = read_chunk(path)
        except StorageError:  # it may be whole, and is not judged again
            raise
        except UserError:
            continue
        if identity_of(table) == dict(identity):
            episodes.append(_episodes(table))
            accuracies.append(table.column("accuracy").to_numpy())
    found, first = np.unique(np.concatenate(episodes), return_index=True)
    return found, np.concatenate(accuracies)[first]


def _chunk_files(folder: Place) -> list[Place]:
    with reaching(folder):
        return sorted(folder.glob("*.parquet"), key=str)


def read_chunk(path: Place) -> pa.Table:
    """Read one file; the metadata of the table is the identity alone.

    Raises:
        UserError: it is not a whole chunk of records.
    """
    try:
        source = pa.BufferReader(read_bytes(path))
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            problem = column_problem(file.schema_arrow)
            if problem is None:
                _require_reasonable(file, source.size())
                table = with_predictions(file.read(use_threads=False))
                table.validate(full=True)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except StorageError:
        raise
    except Exception as error:  # pyarrow has no list of what it raises on damage
        refused = storage_error(error, path) if isinstance(error, OSError) else None
        raise refused or UserError(
            f"{path}: is torn or no file of records", remedy=_REMEDY
        ) from None
    problem = problem or value_problem(table)
    if problem:
        raise UserError(f"{path}: {problem}", remedy=_REMEDY)
    metadata = dict(table.schema.metadata or {})
    metadata.pop(_CIRCUMSTANCES, None)
    return table.replace_schema_metadata(metadata)


def _runs(numbers: NDArray[np.int64]) -> list[range]:
    """Group sorted numbers into runs of consecutive ones."""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [range(int(group[0]), int(group[-1]) + 1) for group in groups if len(group)]


def _episodes(table: pa.Table) -> NDArray[np.int64]:
    return np.asarray(table.column("episode").to_numpy(), dtype=np.int64)


def _require_reasonable(file: pq.ParquetFile, length: int) -> None:
    """Check that a file does not claim to unpack to far more than it is.

    Only rows and columns are read: on some damaged files pyarrow ends the process, and raises
    nothing, when it reads the metadata of their parts.

    Raises:
        ValueError: it does.
    """
    types = file.schema_arrow.types
    sizes = [each.list_size if pa.types.is_fixed_size_list(each) else 1 for each in types]
    unpacked = 8 * file.metadata.num_rows * sum(sizes)
    if unpacked > _UNPACKED + _PACKED_AT_MOST * length:
        raise ValueError(f"{length} bytes that unpack to {unpacked}")


def _overlaps(chunks: Mapping[Place, pa.Table]) -> list[str]:
    """Name each chunk that begins before the one that reaches furthest has ended."""
    problems: list[str] = []
    furthest, holder = -1, ""
    for path, table in chunks.items():
        episodes = _episodes(table)
        if episodes[0] <= furthest:
            problems.append(
                f"{path}: episodes {episodes[0]} to {min(furthest, int(episodes[-1]))} are in"
                f" {holder} too"
            )
        if episodes[-1] > furthest:
            furthest, holder = int(episodes[-1]), path.name
    return problems


def _difference(schema: pa.Schema, reference: pa.Schema) -> str:
    """Return how records differ from those that are wanted: in columns, or in identity."""
    if not schema.equals(reference, check_metadata=False):
        return "has another number of inner steps or ways than the chunks beside it"
    found, wanted = schema.metadata or {}, reference.metadata or {}
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    texts = [
        f"{_shown(key)} is {_shown(found.get(key))}, expected {_shown(wanted.get(key))}"
        for key in keys
    ]
    return f"belongs to another campaign ({'; '.join(texts)})"


def _shown(value: bytes | None) -> str:
    return "absent" if value is None else value.decode(errors="replace")[:_LONGEST_SHOWN]
