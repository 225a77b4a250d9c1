"""What a campaign keeps: one record an episode, one Parquet file a chunk.

A chunk is a run of consecutive episodes; its file carries the identity of what was judged (which
weights, which episodes, which settings) in its schema metadata. Files appear whole or not at all,
so a campaign that is killed goes on with the chunks that have none. How the episodes were cut
into chunks leaves no trace in the records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from raymaml.common.errors import StorageError, UserError, gathered, storage_error
from raymaml.common.untrusted import checked, parse_json
from raymaml.evaluation.record_checks import (
    column_problem,
    difference,
    episodes_of,
    gaps,
    impossible,
    overlaps,
    record_schema,
    require_reasonable,
)
from raymaml.storage.files import reaching, read_bytes, replacing
from raymaml.storage.place import Place

if TYPE_CHECKING:
    from raymaml.evaluation.examination import Examination

BINS = 15
"""Of the confidence, equally wide in 0..1."""

_CIRCUMSTANCES = b"circumstances"
_LISTS = {
    *("accuracy_by_step", "loss_by_step", "class_accuracy", "class_ids", "support_rows"),
    *("support_labels", "query_rows", "query_labels", "bin_count", "bin_confidence", "bin_correct"),
}
_TEXTS = TypeAdapter(dict[str, str])
_REMEDY = "move it away and run `raymaml test` again, which judges only what is missing"


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """The result of one episode; of the query set after the last inner step, if not said otherwise.

    Raises:
        ValueError: when ``accuracy`` or ``loss`` is not the last entry of its values by step.
    """

    episode: int
    """Index of the episode in its split."""
    accuracy: float
    """Share of the query images classified rightly, 0..1."""
    loss: float
    """Mean cross-entropy, nats."""
    accuracy_by_step: tuple[float, ...]
    """Accuracy after 0, 1, .. T inner steps."""
    loss_by_step: tuple[float, ...]
    """Loss after 0, 1, .. T inner steps."""
    class_accuracy: tuple[float, ...]
    """Share of the query images of each label 0..N-1 classified rightly."""
    class_ids: tuple[int, ...]
    """Bank class of each label 0..N-1."""
    support_rows: tuple[int, ...]
    """Rows of the bank, in the order in which the model sees the support images: [N*K]."""
    support_labels: tuple[int, ...]
    """Labels of these images: [N*K]."""
    query_rows: tuple[int, ...]
    """Rows of the bank, in the order in which the model sees the query images: [N*Q]."""
    query_labels: tuple[int, ...]
    """Labels of these images: [N*Q]."""
    bin_count: tuple[int, ...]
    """Query images by their largest probability p: those of bin ``floor(15 p)``, 0..14..."""
    bin_confidence: tuple[float, ...]
    """...the sum of these p..."""
    bin_correct: tuple[int, ...]
    """...and how many of them are classified rightly."""
    brier: float
    """Mean over the query images of the squared distance between probabilities and one-hot label,
    0..2."""
    seconds: float
    """Time that adapting and judging took: the one value that another judgement does not repeat."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "loss"):
            value, steps = getattr(self, name), getattr(self, f"{name}_by_step")
            if not steps or not _same(steps[-1], value):
                raise ValueError(
                    f"episode {self.episode}: {name} is {value} but {name}_by_step ends in"
                    f" {steps[-1:]}"
                )


_INTEGERS = {
    *("episode", "class_ids", "support_rows", "support_labels", "query_rows", "query_labels"),
    *("bin_count", "bin_correct"),
}
_COLUMNS = {
    field.name: pa.int64() if field.name in _INTEGERS else pa.float64()
    for field in fields(EpisodeRecord)
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordArrays:
    """The records of one arm, column by column, in the order of the episodes."""

    bank: str
    """Content hash of the bank that classes and rows are of; "" where it is not known."""
    episode: NDArray[np.int64]  # [E]
    accuracy: NDArray[np.float64]  # [E]
    loss: NDArray[np.float64]  # [E]
    accuracy_by_step: NDArray[np.float64]  # [E, T+1]
    loss_by_step: NDArray[np.float64]  # [E, T+1]
    class_accuracy: NDArray[np.float64]  # [E, N]
    class_ids: NDArray[np.int64]  # [E, N]
    support_rows: NDArray[np.int64]  # [E, N*K]
    support_labels: NDArray[np.int64]  # [E, N*K]
    query_rows: NDArray[np.int64]  # [E, N*Q]
    query_labels: NDArray[np.int64]  # [E, N*Q]
    bin_count: NDArray[np.int64]  # [E, BINS]
    bin_confidence: NDArray[np.float64]  # [E, BINS]
    bin_correct: NDArray[np.int64]  # [E, BINS]
    brier: NDArray[np.float64]  # [E]
    seconds: NDArray[np.float64]  # [E]
    examination: Examination | None = None
    """Of the model; None where it was not examined with these records."""


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def chunk_path(folder: Place, first: int, count: int) -> Place:
    """Name the file of episodes ``first`` to ``first + count - 1``."""
    return folder / f"episodes-{first:08d}-{first + count - 1:08d}.parquet"


def write_chunk(
    path: Place,
    records: Sequence[EpisodeRecord],
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


def records_table(records: Sequence[EpisodeRecord]) -> pa.Table:
    """Return records of consecutive episodes as a table.

    Raises:
        ValueError: when there are no records, their episodes are not consecutive, or they differ
            in the number of inner steps, ways, shots or queries.
    """
    if not records:
        raise ValueError("a chunk has at least one record")
    episodes = [record.episode for record in records]
    if episodes != list(range(episodes[0], episodes[0] + len(episodes))):
        raise ValueError(f"the episodes of a chunk are consecutive; got {episodes}")
    schema = record_schema(_COLUMNS, {name: len(getattr(records[0], name)) for name in _LISTS})
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    # pa.ArrowInvalid is a ValueError: raised where a list has another length than the first.
    return pa.table(columns, schema=schema)


def missing_chunks(
    folder: Place, num_episodes: int, chunk_size: int, identity: Mapping[str, str]
) -> list[range]:
    """Cut the episodes that no complete chunk in ``folder`` holds into chunks.

    The chunks found may be of any size: what is left is cut anew, so that a campaign can go on
    with another ``chunk_size`` or more episodes.
    """
    judged, _ = _judged(folder, identity)
    missing = np.setdiff1d(np.arange(num_episodes), judged)
    return [
        range(start, min(start + chunk_size, hole.stop))
        for hole in _runs(missing)
        for start in range(hole.start, hole.stop, chunk_size)
    ]


def read_records(
    source: Place | Sequence[Place],
    num_episodes: int | None = None,
    identity: Mapping[str, str] | None = None,
) -> pa.Table:
    """Read the chunks of a folder, or those listed, as one table sorted by episode.

    Given ``num_episodes``, the table holds exactly episodes 0 to ``num_episodes - 1`` (later ones
    are left out); given ``identity``, every chunk must carry it. The table's own identity is
    ``identity_of(table)``.

    Raises:
        UserError: when there is no chunk, and for every chunk that cannot be read, has another
            identity or overlaps another, and for every hole.
    """
    if isinstance(source, Sequence):
        paths, place = list(source), source[0].parent if source else Path()
    else:
        paths, place = _chunk_files(source), source
    if not paths:
        raise UserError(f"{place}: holds no record files", remedy="run `raymaml test` first")
    chunks = _read_all(paths)
    reference = next(iter(chunks.values())).schema
    if identity is not None:
        reference = reference.with_metadata(dict(identity))
    with gathered() as mistakes:
        for path, table in chunks.items():
            if not table.schema.equals(reference, check_metadata=True):
                mistakes.add(f"{path}: {difference(table.schema, reference)}", remedy=_REMEDY)
        for problem in overlaps(chunks):
            mistakes.add(problem, remedy=_REMEDY)
        if num_episodes is not None:
            mistakes.extend(_holes(place, chunks, num_episodes))
    table = pa.concat_tables(chunks.values()).combine_chunks()
    return table if num_episodes is None else table.slice(0, num_episodes)


def identity_of(table: pa.Table) -> dict[str, str]:
    """Return the identity that the records of ``table`` carry."""
    metadata = table.schema.metadata or {}
    return {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in metadata.items()
    }


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


def recorded_accuracies(
    folder: Place, num_episodes: int, identity: Mapping[str, str]
) -> NDArray[np.float64]:
    """Return the accuracies of those of episodes 0 to ``num_episodes - 1`` that have a record.

    Files that are torn, or of another identity, count as missing.
    """
    episodes, accuracies = _judged(folder, identity)
    return accuracies[episodes < num_episodes]


def leading_accuracies(folder: Place, identity: Mapping[str, str]) -> NDArray[np.float64]:
    """Return the accuracies of episodes 0, 1, .. up to the first that has no record: [n].

    Files that are torn, or of another identity, count as missing.
    """
    episodes, accuracies = _judged(folder, identity)
    return accuracies[: np.count_nonzero(episodes == np.arange(len(episodes)))]


def _judged(
    folder: Place, identity: Mapping[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the episodes of all complete chunks of this identity, sorted, and their accuracies."""
    episodes, accuracies = [np.empty(0, np.int64)], [np.empty(0)]
    for path in _chunk_files(folder):
        try:
            table = read_chunk(path)
        except StorageError:  # it may be whole, and is not judged again
            raise
        except UserError:
            continue
        if identity_of(table) == dict(identity):
            episodes.append(episodes_of(table))
            accuracies.append(table.column("accuracy").to_numpy())
    found, first = np.unique(np.concatenate(episodes), return_index=True)
    return found, np.concatenate(accuracies)[first]


def record_arrays(table: pa.Table) -> RecordArrays:
    """Return the columns of ``table`` as numpy arrays."""
    bank = identity_of(table).get("bank", "")
    return RecordArrays(bank=bank, examination=None, **_columns(table))


def _columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    def column(name: str) -> NDArray[Any]:
        values = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            flat = values.flatten().to_numpy(zero_copy_only=False)
            return np.asarray(flat).reshape(len(table), values.type.list_size)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    return {name: column(name) for name in _COLUMNS}


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
            problem = column_problem(file.schema_arrow, _COLUMNS, _LISTS)
            if problem is None:
                require_reasonable(file, source.size())
                table = file.read(use_threads=False)
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
    problem = problem or gaps(table) or impossible(_columns(table))
    if problem:
        raise UserError(f"{path}: {problem}", remedy=_REMEDY)
    metadata = dict(table.schema.metadata or {})
    metadata.pop(_CIRCUMSTANCES, None)
    return table.replace_schema_metadata(metadata)


def _read_all(paths: Sequence[Place]) -> dict[Place, pa.Table]:
    """Read every chunk, in the order of their episodes; one UserError for all bad files."""
    tables: dict[Place, pa.Table] = {}
    with gathered() as mistakes:
        for path in paths:
            with mistakes.kept():
                tables[path] = read_chunk(path)
    return dict(sorted(tables.items(), key=lambda item: int(episodes_of(item[1])[0])))


def _holes(place: Place, chunks: Mapping[Place, pa.Table], num_episodes: int) -> list[str]:
    present = np.concatenate([episodes_of(table) for table in chunks.values()])
    return [
        f"{place}: no record of episodes {hole.start} to {hole.stop - 1}; run `raymaml test`"
        " again, which judges only what is missing"
        for hole in _runs(np.setdiff1d(np.arange(num_episodes), present))
    ]


def _runs(numbers: NDArray[np.int64]) -> list[range]:
    """Group sorted numbers into runs of consecutive ones."""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [range(int(group[0]), int(group[-1]) + 1) for group in groups if len(group)]
