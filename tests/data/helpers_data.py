"""Small banks for tests, and where the published files lie that some of them compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ClassImages, ImageBank, write_bank
from raymaml.data.sampling import EpisodeRows

SHARED = Path(__file__).resolve().parents[3] / "shared"
LISTS = SHARED / "data" / "splits"


def make_classes(
    counts: dict[str, list[int]], size: int = 4, channels: int = 1, seed: int = 0
) -> list[ClassImages]:
    """Random classes: ``counts`` gives each split's images per class."""
    generator = np.random.default_rng(seed)
    return [
        ClassImages(
            name=f"{split}-{number}",
            split=split,
            images=generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
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


def spec_of(ways: int, shots: int, queries: int, episodes: int) -> EpisodesConfig:
    return EpisodesConfig(
        num_ways=ways, num_shots=shots, num_queries=queries, num_episodes=episodes
    )


def as_lists(rows: EpisodeRows) -> list[object]:
    return [rows.index, rows.seed, *(a.tolist() for a in (rows.classes, rows.support, rows.query))]
