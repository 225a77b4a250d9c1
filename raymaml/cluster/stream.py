"""Ray Data: the episodes of one worker, in the order in which it learns from them.

Every worker runs a pipeline of its own over its own share. So a share can have any size, no split
coordinator stands between the workers, and a new number of workers just makes new shares.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data

from raymaml.cluster.internals import slow_down
from raymaml.cluster.workers import READER_CPUS
from raymaml.data.loader import EpisodeLoader
from raymaml.data.prefetch import prefetch
from raymaml.data.shard_format import cut, read_pixels, read_rows
from raymaml.data.shards import EpisodeShards
from raymaml.storage.place import Place
from raymaml.training.data import MetaBatches, TrainingData
from raymaml.types import EpisodeBatch

ROWS_AT_ONCE = 2048
"""Row-number episodes one reading task returns: about 1 MB, so that a task is mostly reading."""
PIXELS_AT_ONCE = 16 << 20
"""Bytes of pixels one reading task returns from materialised shards."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which episodes one worker learns from, from one outer step on."""

    data: TrainingData
    first_step: int
    num_steps: int
    rank: int
    world_size: int

    def indices(self, step: int) -> range:
        """Return the episodes of outer step ``step``."""
        return self.data.indices(step, self.rank, self.world_size)


def stream_meta_batches(share: Share, timeout: float | None = None) -> MetaBatches:
    """Yield the worker's share of each meta-batch, pixels and all, made ready ahead of time.

    Raises:
        RuntimeError: Ray Data delivered an episode out of turn.
        TimeoutError: nothing came for ``timeout`` seconds.
    """
    return prefetch(_meta_batches(share), timeout=timeout)


def _meta_batches(share: Share) -> Iterator[EpisodeBatch]:
    train = share.data.train
    steps = range(share.first_step, share.num_steps)
    pieces = cut(_tables(share), (len(share.indices(step)) for step in steps))
    for step, piece in zip(steps, pieces, strict=True):
        yield _load(piece, share.indices(step), train.shards, train.loader)


def _tables(share: Share) -> Iterator[Any]:
    """Yield tables of consecutive episodes of the share, read by Ray Data tasks."""
    shards = share.data.train.shards
    at_once = _steps_at_once(share)
    tasks = [
        {"start": step, "stop": min(step + at_once, share.num_steps)}
        for step in range(share.first_step, share.num_steps, at_once)
    ]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        functools.partial(_read, episodes=_Episodes.of(share)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
        concurrency=1,
        **_away_from_gpus(),
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    options.verbose_progress = False
    dataset.context.enable_progress_bars = False
    slow_down(dataset.context, 0.01 if shards.materialized else 0.05)
    yield from dataset.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=4 if shards.materialized else 1
    )


def _away_from_gpus() -> dict[str, Any]:
    """Return options of Ray Data that have reading tasks run on nodes without GPUs.

    Nodes that join later are used as well. While no other node has room, or when all others are
    gone, tasks run on the nodes with GPUs: nothing waits for a node.
    """
    alive = (node for node in ray.nodes() if node["Alive"])
    gpus = [node["NodeID"] for node in alive if node["Resources"].get("GPU")]
    if not gpus:
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"!in({','.join(gpus)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _steps_at_once(share: Share) -> int:
    """Return how many outer steps one reading task covers."""
    shards, per_step = share.data.train.shards, max(1, len(share.indices(0)))
    if not shards.materialized:
        return max(1, ROWS_AT_ONCE // per_step)
    channels, height, width = share.data.image_shape
    images = shards.spec.num_ways * shards.spec.images_per_class
    return max(1, PIXELS_AT_ONCE // (per_step * images * channels * height * width))


@dataclass(frozen=True, kw_only=True)
class _Episodes:
    """The episodes of a share, for a reading task in another process."""

    place: Place
    cache: Path
    count: int
    meta_batch_size: int
    mine: range
    """Of the positions in a meta-batch."""

    @classmethod
    def of(cls, share: Share) -> _Episodes:
        shards = share.data.train.shards
        return cls(
            place=shards.place.absolute(),
            cache=shards.cache,
            count=shards.count,
            meta_batch_size=share.data.meta_batch_size,
            mine=share.indices(0),
        )

    def indices(self, start: int, stop: int) -> list[int]:
        """Return which episodes the outer steps from ``start`` to before ``stop`` take."""
        steps = range(start, stop)
        return [(step * self.meta_batch_size + i) % self.count for step in steps for i in self.mine]


def _read(block: Any, *, episodes: _Episodes) -> Any:
    """Read the episodes of the outer steps that the rows of ``block`` name."""
    indices = [index for row in block.to_pylist() for index in episodes.indices(**row)]
    return _open(episodes.place, episodes.cache).table(indices)


@functools.lru_cache(maxsize=4)
def _open(place: Place, cache: Path) -> EpisodeShards:
    # The driver and every worker have verified the hashes.
    return EpisodeShards.open(place, cache, verify=False)


def _load(
    table: Any | None, wanted: range, shards: EpisodeShards, loader: EpisodeLoader
) -> EpisodeBatch:
    if table is None:
        return loader.load([], [])
    expected = [index % shards.count for index in wanted]
    delivered = table["index"].to_pylist()
    if delivered != expected:
        raise RuntimeError(f"Ray Data delivered episodes {delivered}, expected {expected}")
    rows = read_rows(table)
    if shards.materialized:
        return loader.load_pixels(rows, *read_pixels(table), wanted)
    return loader.load(rows, wanted)
