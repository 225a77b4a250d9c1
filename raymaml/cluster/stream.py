"""Ray Data: the episodes of one worker, in the order in which it learns from them.

Every worker runs a pipeline of its own over its own share. So a share can have any size, no split
coordinator stands between the workers, and a new number of workers just makes new shares.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import ray.data

from raymaml.cluster.internals import slow_down
from raymaml.cluster.reading import read_steps
from raymaml.cluster.workers import READER_CPUS
from raymaml.data.loader import EpisodeLoader
from raymaml.data.prefetch import prefetch
from raymaml.data.shard_format import cut, read_pixels, read_rows
from raymaml.data.shards import EpisodeShards
from raymaml.training.data import EpisodeSet, MetaBatches, TrainingData
from raymaml.types import EpisodeBatch

ROWS_AT_ONCE = 2048
"""Row-number episodes one reading task returns: about 1 MB, so that a task is mostly reading."""
PIXELS_AT_ONCE = 16 << 20
"""Bytes of pixels one reading task returns from materialised shards."""


def stream_meta_batches(
    data: TrainingData, steps: range, rank: int, world_size: int, timeout: float | None = None
) -> MetaBatches:
    """Yield a worker's share of the meta-batches of outer steps, pixels and all, read ahead.

    Raises:
        RuntimeError: Ray Data delivered an episode out of turn.
        TimeoutError: nothing came for ``timeout`` seconds.
    """
    train, mine = data.train, data.indices(0, rank, world_size)
    assert isinstance(train, EpisodeSet)

    def load() -> Iterator[EpisodeBatch]:
        tables = _tables(data, train.shards, steps, mine)
        pieces = cut(tables, itertools.repeat(len(mine), len(steps)))
        for step, piece in zip(steps, pieces, strict=True):
            wanted = data.indices(step, rank, world_size)
            yield _load(piece, wanted, train.shards, train.loader)

    return prefetch(load(), timeout=timeout)


def _tables(data: TrainingData, shards: EpisodeShards, steps: range, mine: range) -> Iterator[Any]:
    """Yield tables of the episodes, in order, read by Ray Data tasks; ``mine`` are of step 0."""
    at_once = _steps_at_once(shards, data.image_shape, len(mine))
    tasks = [
        {"start": start, "stop": min(start + at_once, steps.stop)} for start in steps[::at_once]
    ]
    read = functools.partial(
        read_steps,
        place=shards.place.absolute(),
        cache=shards.cache,
        count=shards.count,
        meta_batch_size=data.meta_batch_size,
        mine=mine,
    )
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        read,
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


def _steps_at_once(shards: EpisodeShards, image_shape: tuple[int, int, int], per_step: int) -> int:
    """Return how many outer steps one reading task covers."""
    if not shards.materialized:
        return max(1, ROWS_AT_ONCE // max(1, per_step))
    channels, height, width = image_shape
    images = max(1, per_step) * shards.spec.num_ways * shards.spec.images_per_class
    return max(1, PIXELS_AT_ONCE // (images * channels * height * width))


def _load(
    table: Any | None, wanted: range, shards: EpisodeShards, loader: EpisodeLoader
) -> EpisodeBatch:
    if table is None:
        return loader.load([], [])
    expected = [index % shards.count for index in wanted]
    delivered = table["index"].to_pylist()
    if delivered != expected:
        raise RuntimeError(f"Ray Data delivered episodes {delivered}, expected {expected}")
    pixels = read_pixels(table) if shards.materialized else None
    return loader.load(read_rows(table), wanted, pixels)
