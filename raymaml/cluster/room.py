"""Room for workers: how many a cluster can run now, and when it could run more.

The scheduler itself is asked, by a placement group for each worker. A table of nodes would not do:
it lags some 15 s behind a node that dies, says nothing of who else uses the cluster, and counts
nodes that drain. A group is there only once its node has answered; and one that waits tells an
autoscaler what is wanted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from raymaml.cluster.runtime import cluster_resources, count_slots, worker_resources
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig
from raymaml.training.crew import Crew, Rest

SETTLE_SECONDS = 2.0
"""Nodes of one order join one after the other: so long none must have, before workers start."""
GROW_SECONDS = 20.0
"""A new crew costs some 10 s without training: workers learn for so long before there are more."""
TELL_SECONDS = 5.0
_POLL_SECONDS = 0.2


def find_room(
    crew: Crew, cluster: ClusterConfig, given_up: threading.Event, echo: Callable[[str], None]
) -> int:
    """Return for how many workers, up to the maximum, there is room; 0 once ``given_up`` is set.

    Whoever waits for long is told for what.

    Raises:
        UserError: there has not been enough for ``cluster.wait_seconds``.
    """
    rest, start, told = Rest(SETTLE_SECONDS), time.monotonic(), False
    with _reserved(crew, crew.maximum) as found:
        while not given_up.wait(_POLL_SECONDS):
            room, now = _within_slots(found(), crew), time.monotonic()
            settled = rest.reached(room, now) or room == crew.maximum
            if room >= crew.minimum and settled:
                return room
            if now - start > cluster.wait_seconds:
                raise _too_little(crew, cluster, room)
            if not told and now - start > TELL_SECONDS:
                told = True
                echo(
                    f"the Ray cluster has room for {room} worker(s): waiting for {crew.minimum},"
                    f" for {cluster.wait_seconds:g} s at most"
                )
    return 0


@contextlib.contextmanager
def growing(
    crew: Crew, workers: int, started: Callable[[], bool], ask: Callable[[], None]
) -> Iterator[None]:
    """During the block, call ``ask`` when there has come to be room for more than ``workers``.

    Before they have ``started``, which takes room, none is looked for.
    """
    if workers == crew.maximum:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(crew, workers, started, ask, over), name="growing", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(
    crew: Crew,
    workers: int,
    started: Callable[[], bool],
    ask: Callable[[], None],
    over: threading.Event,
) -> None:
    from ray.exceptions import RayError

    while not started():
        if over.wait(1):
            return
    rest, start = Rest(SETTLE_SECONDS), time.monotonic()
    # Of a cluster that is gone the workers' own failure tells.
    with contextlib.suppress(RayError), _reserved(crew, crew.maximum - workers) as found:
        while not over.wait(_POLL_SECONDS):
            room, now = _within_slots(workers + found(), crew), time.monotonic()
            if rest.reached(room, now) and room > workers and now - start > GROW_SECONDS:
                ask()
                over.wait()


@contextlib.contextmanager
def _reserved(crew: Crew, count: int) -> Iterator[Callable[[], int]]:
    """Ask for room for ``count`` workers; yield what tells for how many it is held."""
    from ray.util import placement_group, placement_group_table, remove_placement_group

    groups = [placement_group([worker_resources(crew.use_gpu)]) for _ in range(count)]

    def found() -> int:
        table = placement_group_table()
        states = (table.get(group.id.hex(), {}).get("state") for group in groups)
        return sum(state == "CREATED" for state in states)

    try:
        yield found
    finally:
        for group in groups:
            remove_placement_group(group)


def _within_slots(room: int, crew: Crew) -> int:
    """Leave each CPU worker a whole core: it reserves a little less, for the sake of its reader."""
    return min(room, count_slots(cluster_resources(), crew.use_gpu)[0])


def _too_little(crew: Crew, cluster: ClusterConfig, room: int) -> UserError:
    key = "num_workers" if cluster.min_workers is None else "min_workers"
    return UserError(
        f"cluster.{key} is {crew.minimum} but for {cluster.wait_seconds:g} s"
        f" (cluster.wait_seconds) the Ray cluster has had room for {room} worker(s); add nodes, end"
        " what else uses them, or lower it; what is trained is kept: run the same command to go on"
    )
