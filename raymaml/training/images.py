"""The training images of a bank with their classes, in slices: the data of a pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raymaml.data.loader import EpisodeLoader
from raymaml.data.sampling import EpisodeRows
from raymaml.data.watch import Watch
from raymaml.seeding import bit_stream, draw_without_replacement, fold_in
from raymaml.types import EpisodeBatch

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """All images of the train split, each epoch in another order, cut into slices.

    The images of a slice are a function of the seed and its number alone (contract 4).
    """

    loader: EpisodeLoader
    watch: Watch
    seed: int
    slice_size: int
    manifest_hash = ""
    """No sampled episodes."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the train split."""
        return len(self.loader.bank.class_ids("train"))

    def load(self, indices: range) -> EpisodeBatch:
        """Read slices by number: query sets ``[E, n, C, H, W]`` without support sets.

        The label of an image is the place of its class among those of the train split.
        """
        return self.loader.load([self.rows(index) for index in indices], indices)

    def rows(self, index: int) -> EpisodeRows:
        """Return the row numbers of a slice."""
        bank = self.loader.bank
        ids = bank.class_ids("train")
        ends = np.cumsum([bank.classes[i].count for i in ids.tolist()], dtype=np.int64)
        count = int(ends[-1])
        images = range(index * self.slice_size, (index + 1) * self.slice_size)
        drawn = [_order(self.seed, i // count, count)[i % count] for i in images]
        places = np.array(drawn, dtype=np.int64)
        labels = np.searchsorted(ends, places, side="right").astype(np.int64)
        rows = bank.first_row[ids[labels] + 1] - (ends[labels] - places)
        return EpisodeRows(
            index=index,
            seed=fold_in(self.seed, "pretrain", index),
            classes=ids,
            support=_NONE,
            support_labels=_NONE,
            query=rows,
            query_labels=labels,
        )

    def names(self, indices: range) -> list[str]:
        """Return how messages name slices."""
        return [f"slice {index} of the images" for index in indices]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of the images in an epoch: ``[count]``."""
    return draw_without_replacement(bit_stream(seed, "pretrain", epoch), count, count)
