"""Checks of files of records: could judging have written them?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymaml.evaluation.records import COLUMNS, LISTS, record_schema
from raymaml.storage.place import Place

_UNPACKED, _PACKED_AT_MOST = 64 << 20, 200
"""Bytes that a file may unpack to whatever its length, and times its length beyond."""
_LONGEST_SHOWN = 1000
_MAY_DIVERGE = {"loss", "loss_by_step", "brier", "bin_confidence"}
_LABELS = {"support_labels", "query_labels"}
_RANGES: dict[str, tuple[float, float]] = {
    "episode": (0, 2**62),
    **dict.fromkeys(("accuracy", "accuracy_by_step", "class_accuracy"), (0, 1 + 1e-6)),
    **dict.fromkeys(("loss", "loss_by_step"), (-1e-3, 1e39)),
    "brier": (0, 2 + 1e-3),
}
"""Of the other columns 0 to 2^31 - 1. Bounds of what is computed leave room for rounding."""


def require_reasonable(file: pq.ParquetFile, length: int) -> None:
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


def column_problem(found: pa.Schema) -> str | None:
    """Return how the columns of a file differ from those of records; None if they do not.

    Raises:
        KeyError: a list is missing.
    """
    if COLUMNS.keys() - set(found.names) == _LABELS:
        return (
            "is of an older raymaml, which showed images in the order of their labels, so that"
            " their place gave the label away; sample again with `raymaml data sample`"
        )
    expected = record_schema({name: found.field(name).type.list_size for name in LISTS})
    if not found.equals(expected, check_metadata=False):
        return "has other columns than a file of records"
    return None


def gaps(table: pa.Table) -> str | None:
    """Name the columns that lack values, or whose lists do; None if there are none."""

    def has_gaps(name: str) -> bool:
        values = table.column(name).combine_chunks()
        inner = values.flatten() if name in LISTS else values
        return bool(values.null_count or inner.null_count)

    return _named("gaps in", [*filter(has_gaps, table.column_names)])


def impossible(columns: Mapping[str, NDArray[Any]]) -> str | None:
    """Name the columns with values that no judgement gives; losses may be infinite or NaN."""
    episodes = columns["episode"]
    if not len(episodes) or not np.array_equal(episodes, np.arange(len(episodes)) + episodes[0]):
        return "its episodes are not consecutive"
    ways, strange = columns["class_ids"].shape[1], []
    for name, value in columns.items():
        low, high = _RANGES.get(name, (0, 2**31 - 1))
        inside = (value >= low) & (value <= high)
        if name in _MAY_DIVERGE:
            inside |= ~np.isfinite(value)
        if not inside.all() or (name in _LABELS and not _are_balanced(value, ways)):
            strange.append(name)
    return _named("impossible values of", strange)


def _are_balanced(labels: NDArray[Any], ways: int) -> bool:
    """Whether each row of labels [E, n] holds every label 0..ways-1 equally often."""
    if ways == 0 or labels.shape[1] % ways:
        return False
    wanted = np.repeat(np.arange(ways), labels.shape[1] // ways)
    return bool((np.sort(labels, axis=1) == wanted).all())


def episodes_of(table: pa.Table) -> NDArray[np.int64]:
    """Return the numbers of the episodes of a table of records."""
    return np.asarray(table.column("episode").to_numpy(), dtype=np.int64)


def overlaps(chunks: Mapping[Place, pa.Table]) -> list[str]:
    """Name each chunk that begins before the one that reaches furthest has ended."""
    problems: list[str] = []
    furthest, holder = -1, ""
    for path, table in chunks.items():
        episodes = episodes_of(table)
        if episodes[0] <= furthest:
            problems.append(
                f"{path}: episodes {episodes[0]} to {min(furthest, int(episodes[-1]))} are in"
                f" {holder} too"
            )
        if episodes[-1] > furthest:
            furthest, holder = int(episodes[-1]), path.name
    return problems


def difference(schema: pa.Schema, reference: pa.Schema) -> str:
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


def _named(what: str, names: list[str]) -> str | None:
    return f"has {what} {', '.join(names)}" if names else None


def are_of_bank(columns: Mapping[str, NDArray[Any]], num_classes: int, num_images: int) -> bool:
    """Whether the classes and images that records name are those of a bank."""
    images = max(int(columns["support_rows"].max()), int(columns["query_rows"].max()))
    return int(columns["class_ids"].max()) < num_classes and images < num_images
