"""Checks that the row numbers in shards are those of episodes of a bank.

A checksum shows that a file is as it was written, not that its writer can be trusted: an episode
could name a row outside its class, or outside the bank.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ImageBank
from raymaml.data.shard_format import matrix


def row_problem(
    batch: pa.RecordBatch, first: int, bank: ImageBank, spec: EpisodesConfig, split: str
) -> str | None:
    """Return the problem of a batch that begins with episode ``first``; None if it is right."""
    count = len(batch)
    index = np.asarray(batch.column("index").to_numpy())
    if not np.array_equal(index, np.arange(first, first + count)):
        return f"its episodes are not {first} to {first + count - 1}"
    classes = matrix(batch, "classes")  # [E, N]
    checks = {
        f"classes that are not of split {split}": ~np.isin(classes, bank.class_ids(split)),
        "a class twice": np.diff(np.sort(classes, axis=1), axis=1) == 0,
    }
    known = classes.clip(0, len(bank.classes) - 1)
    for name, images in (("support", spec.num_shots), ("query", spec.num_queries)):
        labels = matrix(batch, f"{name}_labels")  # [E, N*images]
        checks[f"{name} labels that are not 0 to {spec.num_ways - 1}, {images} of each"] = np.sort(
            labels, axis=1
        ) != np.repeat(np.arange(spec.num_ways), images)
        owners = np.take_along_axis(known, labels.clip(0, spec.num_ways - 1), 1)
        checks[f"{name} rows that are not of their class"] = _strangers(
            matrix(batch, name), bank, owners
        )
    for text, wrong in checks.items():
        if wrong.any():
            bad = int(np.flatnonzero(wrong.reshape(count, -1).any(axis=1))[0])
            return f"episode {first + bad} has {text}"
    return None


def _strangers(
    rows: NDArray[np.int64], bank: ImageBank, classes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which rows [E, images] are outside their classes [E, images]."""
    first, stop = bank.first_row[classes], bank.first_row[classes + 1]
    strangers: NDArray[np.bool_] = (rows < first) | (rows >= stop)
    return strangers
