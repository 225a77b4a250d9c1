"""What workers send each other in an outer step, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FLOAT = 4
"""Bytes of a float32."""
TOUCHED = 3 * FLOAT
"""Bytes that move when a float is added to a sum: two are read, one is written."""

Collective = Literal["all_gather", "all_to_all", "all_reduce"]
Reduction = Literal["rows to all", "slices", "chunk sums", "all-reduce"]
"""rows to all: every gradient to every worker, each adds all up. slices: each worker adds up its
part of all gradients (what raymaml does). chunk sums: slices of sums over fixed runs of consecutive
episodes. all-reduce: a ring over each worker's own sum; the only one whose bits depend on W."""
REDUCTIONS: tuple[Reduction, ...] = ("rows to all", "slices", "chunk sums", "all-reduce")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between two workers."""

    latency: float
    """Of a message, s."""
    bandwidth: float
    """Bytes/s that a worker sends, receiving as many at the same time."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Workers on nodes; a machine by itself is one node."""

    workers_per_node: int
    inside: Link
    between: Link
    """A worker's share of its node's network cards."""

    def seconds(self, collective: Collective, workers: int, size: int) -> float:
        """Return how long a collective over ``size`` bytes (see ``sends``) takes."""
        messages, sent = sends(collective, workers, size)
        local = min(self.workers_per_node, workers)
        if workers == local:
            return messages * self.inside.latency + sent / self.inside.bandwidth
        if collective == "all_to_all":
            away = (workers - local) / (workers - 1)
            latencies = (local - 1) * self.inside.latency
            latencies += (workers - local) * self.between.latency
            inside = sent * (1 - away) / self.inside.bandwidth
            return latencies + max(inside, sent * away / self.between.bandwidth)
        # What goes around the ring leaves each node once, but the one where it began; as many
        # rings as a node has network cards share the bytes.
        nodes = math.ceil(workers / local)
        around = (workers - nodes) * self.inside.latency + (nodes - 1) * self.between.latency
        slowest = min(self.inside.bandwidth, local * self.between.bandwidth)
        return messages / (workers - 1) * around + sent / slowest


def sends(collective: Collective, workers: int, size: int) -> tuple[int, float]:
    """Return the messages, and bytes, that each worker sends to others.

    Args:
        collective: gather and reduction by a ring, all_to_all to each other worker.
        workers: how many take part: W.
        size: bytes that a worker hands in (all_to_all: for all workers, itself included).
    """
    others = workers - 1
    if collective == "all_gather":
        return others, others * size
    if collective == "all_to_all":
        return others, others * size / workers
    return 2 * others, 2 * others * size / workers


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a reduction of the gradients of one outer step costs a worker."""

    seconds: float
    """Of the collectives."""
    sent: float
    """Bytes to other workers; as many are received."""
    memory: int
    """Bytes of its own rows and of what the collectives take and give."""
    added: int
    """Floats that are added to a sum, one after the other."""


def exchange(
    reduction: Reduction,
    network: Network,
    *,
    workers: int,
    rows: int,
    meta_batch: int,
    num_params: int,
    chunk: int = 1,
) -> Exchange:
    """Work out a reduction.

    Args:
        reduction: which one.
        network: between the workers.
        workers: W.
        rows: gradients of the worker that has most of them.
        meta_batch: gradients of all workers: B.
        num_params: floats of a gradient: P.
        chunk: episodes of one sum (chunk sums).
    """
    own, added = rows * num_params, 0
    calls: list[tuple[Collective, int]] = []  # floats that a worker hands in
    if workers == 1:
        held, added = 0, meta_batch * num_params
    elif reduction == "rows to all":
        calls = [("all_gather", own)]
        held, added = own + workers * own, meta_batch * num_params
    elif reduction == "all-reduce":
        calls = [("all_reduce", num_params)]
        held, added = num_params, own + num_params
    else:
        if reduction == "chunk sums":
            added, rows, meta_batch = own, math.ceil(rows / chunk), math.ceil(meta_batch / chunk)
        width = math.ceil(num_params / workers)
        calls = [("all_to_all", rows * workers * width), ("all_gather", width)]
        held = (rows * workers + meta_batch + workers) * width
        added += meta_batch * width
    return Exchange(
        seconds=sum(network.seconds(call, workers, FLOAT * floats) for call, floats in calls),
        sent=sum(sends(call, workers, FLOAT * floats)[1] for call, floats in calls),
        memory=FLOAT * (own + held),
        added=added,
    )
