"""A record: the result of one episode. Many of them are a table, or arrays column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymaml.evaluation.examination import Examination

BINS = 15
"""Of the confidence, equally wide in 0..1."""
Record = dict[str, Any]
"""The values of one episode by column, as ``RecordArrays`` describes them."""


class Column(NamedTuple):
    """A column of records, and the values that judging can give."""

    kind: pa.DataType
    """Of a value, or of the entries of a list."""
    low: float = 0
    high: float = 2**31 - 1
    is_list: bool = False
    may_diverge: bool = False
    """Whether values may be infinite or nan."""


_WHOLE, _REAL = pa.int64(), pa.float64()
_SHARE = Column(_REAL, high=1 + 1e-6)  # bounds of what is computed leave room for rounding
_LOSS = Column(_REAL, low=-1e-3, high=1e39, may_diverge=True)
_NUMBERS = Column(_WHOLE, is_list=True)
COLUMNS = {
    "episode": Column(_WHOLE, high=2**62),
    "accuracy": _SHARE,
    "loss": _LOSS,
    "accuracy_by_step": _SHARE._replace(is_list=True),
    "loss_by_step": _LOSS._replace(is_list=True),
    "class_accuracy": _SHARE._replace(is_list=True),
    "class_ids": _NUMBERS,
    "support_rows": _NUMBERS,
    "support_labels": _NUMBERS,
    "query_rows": _NUMBERS,
    "query_labels": _NUMBERS,
    "query_predictions": _NUMBERS._replace(low=-1),
    "bin_count": _NUMBERS,
    "bin_confidence": Column(_REAL, is_list=True, may_diverge=True),
    "bin_correct": _NUMBERS,
    "brier": Column(_REAL, high=2 + 1e-3, may_diverge=True),
    "seconds": Column(_REAL),
}
"""In the order of a file."""
_LABELS = {"support_labels", "query_labels"}
_PREDICTIONS = "query_predictions"


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordArrays:
    """The records of one arm, column by column, in the order of the episodes.

    They are of the query set after the last inner step, if not said otherwise.
    """

    bank: str
    """Content hash of the bank that classes and rows are of; "" where it is not known."""
    episode: NDArray[np.int64]  # [E]
    """Index of the episode in its split."""
    accuracy: NDArray[np.float64]  # [E]
    """Share of the query images classified rightly, 0..1."""
    loss: NDArray[np.float64]  # [E]
    """Mean cross-entropy, nats."""
    accuracy_by_step: NDArray[np.float64]  # [E, T+1]
    """Accuracy after 0, 1, .. T inner steps; the last is ``accuracy``."""
    loss_by_step: NDArray[np.float64]  # [E, T+1]
    """Loss after 0, 1, .. T inner steps; the last is ``loss``."""
    class_accuracy: NDArray[np.float64]  # [E, N]
    """Share of the query images of each label 0..N-1 classified rightly."""
    class_ids: NDArray[np.int64]  # [E, N]
    """Bank class of each label 0..N-1."""
    support_rows: NDArray[np.int64]  # [E, N*K]
    """Rows of the bank, in the order in which the model sees the support images."""
    support_labels: NDArray[np.int64]  # [E, N*K]
    query_rows: NDArray[np.int64]  # [E, N*Q]
    """Rows of the bank, in the order in which the model sees the query images."""
    query_labels: NDArray[np.int64]  # [E, N*Q]
    query_predictions: NDArray[np.int64]  # [E, N*Q]
    """Predicted label; -1: the logits are not numbers, or an earlier raymaml did not record it."""
    bin_count: NDArray[np.int64]  # [E, BINS]
    """Query images by their largest probability p: those of bin ``floor(15 p)``, 0..14..."""
    bin_confidence: NDArray[np.float64]  # [E, BINS]
    """...the sum of these p..."""
    bin_correct: NDArray[np.int64]  # [E, BINS]
    """...and how many of them are classified rightly."""
    brier: NDArray[np.float64]  # [E]
    """Mean over the query images of the squared distance between probabilities and one-hot label,
    0..2."""
    seconds: NDArray[np.float64]  # [E]
    """Time that adapting and judging took: the one value that another judgement does not repeat."""
    examination: Examination | None = None
    """Of the model; None where it was not examined with these records."""

    def take(self, places: NDArray[Any]) -> RecordArrays:
        """Return the records at these places, or where a mask is true: [E] -> [n]."""
        columns: dict[str, Any] = {name: getattr(self, name)[places] for name in COLUMNS}
        return replace(self, **columns)

    def are_of_bank(self, num_classes: int, num_images: int) -> bool:
        """Whether the classes and images are those of a bank with this many."""
        last_image = max(self.support_rows.max(), self.query_rows.max())
        return bool(self.class_ids.max() < num_classes and last_image < num_images)


def record_schema(lengths: Mapping[str, int]) -> pa.Schema:
    """Return the columns of records, with lists of these lengths.

    Lists have a fixed size: the type itself says that all episodes have equal steps and ways.
    """
    return pa.schema(
        [
            (name, pa.list_(each.kind, lengths[name]) if each.is_list else each.kind)
            for name, each in COLUMNS.items()
        ]
    )


def records_table(records: Sequence[Record]) -> pa.Table:
    """Return records of consecutive episodes as a table.

    Raises:
        ValueError: when there are no records, their episodes are not consecutive, or they differ
            in the number of inner steps, ways, shots or queries.
    """
    if not records:
        raise ValueError("a chunk has at least one record")
    episodes = [record["episode"] for record in records]
    if episodes != list(range(episodes[0], episodes[0] + len(episodes))):
        raise ValueError(f"the episodes of a chunk are consecutive; got {episodes}")
    lengths = {name: len(records[0][name]) for name, each in COLUMNS.items() if each.is_list}
    # pa.ArrowInvalid is a ValueError: raised where a list has another length than the first.
    return pa.Table.from_pylist(list(records), schema=record_schema(lengths))


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


def column_problem(found: pa.Schema) -> str | None:
    """Return how the columns of a file differ from those of records; None if they do not.

    Raises:
        KeyError: a list is missing.
    """
    if COLUMNS.keys() - {_PREDICTIONS, *found.names} == _LABELS:
        return (
            "is of an older raymaml, which showed images in the order of their labels, so that"
            " their place gave the label away; sample again with `raymaml data sample`"
        )
    earlier = _PREDICTIONS not in found.names
    lists = {name: name for name, each in COLUMNS.items() if each.is_list}
    if earlier:
        lists[_PREDICTIONS] = "query_labels"
    lengths = {name: found.field(like).type.list_size for name, like in lists.items()}
    expected = record_schema(lengths)
    if earlier:
        expected = expected.remove(expected.get_field_index(_PREDICTIONS))
    if not found.equals(expected, check_metadata=False):
        return "has other columns than a file of records"
    return None


def with_predictions(table: pa.Table) -> pa.Table:
    """Return ``table``; one of an earlier raymaml gets the column of predictions, none known."""
    if _PREDICTIONS in table.schema.names:
        return table
    at = table.schema.get_field_index("query_labels")
    kind = table.schema.field(at).type
    unknown = pa.array(np.full(len(table) * kind.list_size, -1))
    column = pa.FixedSizeListArray.from_arrays(unknown, type=kind)
    return table.add_column(at + 1, pa.field(_PREDICTIONS, kind), column)


def value_problem(table: pa.Table) -> str | None:
    """Return which values of ``table`` no judgement gives; None if there are none."""

    def has_gaps(name: str) -> bool:
        values = table.column(name).combine_chunks()
        inner = values.flatten() if COLUMNS[name].is_list else values
        return bool(values.null_count or inner.null_count)

    if missing := [*filter(has_gaps, COLUMNS)]:
        return f"has gaps in {', '.join(missing)}"
    columns = columns_of(table)
    episodes, ways = columns["episode"], columns["class_ids"].shape[1]
    if not len(episodes) or not np.array_equal(episodes, np.arange(len(episodes)) + episodes[0]):
        return "its episodes are not consecutive"
    strange = []
    for name, value in columns.items():
        column = COLUMNS[name]
        inside = (value >= column.low) & (value <= column.high)
        if column.may_diverge:
            inside |= ~np.isfinite(value)
        if not inside.all() or (name in _LABELS and not _are_balanced(value, ways)):
            strange.append(name)
    predictions = columns[_PREDICTIONS]
    if predictions.shape != columns["query_labels"].shape or (predictions >= ways).any():
        strange.append(_PREDICTIONS)
    return f"has impossible values of {', '.join(strange)}" if strange else None


def _are_balanced(labels: NDArray[Any], ways: int) -> bool:
    """Whether each row of labels [E, n] holds every label 0..ways-1 equally often."""
    if ways == 0 or labels.shape[1] % ways:
        return False
    wanted = np.repeat(np.arange(ways), labels.shape[1] // ways)
    return bool((np.sort(labels, axis=1) == wanted).all())
