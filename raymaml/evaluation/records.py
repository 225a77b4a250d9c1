"""A record: the result of one episode. Many of them are a table, or arrays column by column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymaml.evaluation.examination import Examination

BINS = 15
"""Of the confidence, equally wide in 0..1."""


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
            both_nan = bool(steps) and math.isnan(steps[-1]) and math.isnan(value)
            if not steps or (steps[-1] != value and not both_nan):
                raise ValueError(
                    f"episode {self.episode}: {name} is {value} but {name}_by_step ends in"
                    f" {steps[-1:]}"
                )


COLUMNS = {
    field.name: pa.int64() if "int" in str(field.type) else pa.float64()
    for field in fields(EpisodeRecord)
}
"""The type of each column, or of the entries of its lists."""
LISTS = {field.name for field in fields(EpisodeRecord) if "tuple" in str(field.type)}
"""The columns that hold lists."""


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

    def take(self, places: NDArray[Any]) -> RecordArrays:
        """Return the records at these places, or where a mask is true: [E] -> [n]."""
        own = vars(self).items()
        columns: dict[str, Any] = {
            n: each[places] for n, each in own if isinstance(each, np.ndarray)
        }
        return replace(self, **columns)


def record_schema(lengths: Mapping[str, int]) -> pa.Schema:
    """Return the columns of records, with lists of these lengths.

    Lists have a fixed size: the type itself says that all episodes have equal steps and ways.
    """
    return pa.schema(
        [
            (name, pa.list_(kind, lengths[name]) if name in LISTS else kind)
            for name, kind in COLUMNS.items()
        ]
    )


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
    schema = record_schema({name: len(getattr(records[0], name)) for name in LISTS})
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    # pa.ArrowInvalid is a ValueError: raised where a list has another length than the first.
    return pa.table(columns, schema=schema)


def record_arrays(table: pa.Table) -> RecordArrays:
    """Return the columns of ``table`` as numpy arrays."""
    bank = identity_of(table).get("bank", "")
    return RecordArrays(bank=bank, examination=None, **columns_of(table))


def columns_of(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the columns of ``table`` as numpy arrays, by name."""

    def column(name: str) -> NDArray[Any]:
        values = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            flat = values.flatten().to_numpy(zero_copy_only=False)
            return np.asarray(flat).reshape(len(table), values.type.list_size)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    return {name: column(name) for name in COLUMNS}


def identity_of(table: pa.Table) -> dict[str, str]:
    """Return the identity that the records of ``table`` carry."""
    metadata = table.schema.metadata or {}
    return {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in metadata.items()
    }
