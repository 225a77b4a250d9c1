"""Elastic training: a crew of workers, as many as the cluster has room for now.

Each worker asks the scheduler for room by a placement group. A table of nodes would not do: it lags
some 15 s behind a node that dies, does not show other users of the cluster, and counts nodes that
drain. A group exists only once its node has answered; a group that waits shows an autoscaler the
demand.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group

from raymaml.cluster.runtime import in_background
from raymaml.cluster.workers import count_slots, plan_workers, wants_gpu, worker_resources
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config

SETTLE_SECONDS = 2.0
"""Nodes that are ordered together join one after the other: workers start once none has joined for
this long."""
GROW_SECONDS = 20.0
"""A new crew costs some 10 s without training: workers train at least this long before they are
replaced by more."""
_ANNOUNCE_SECONDS = 5.0
"""A wait that is longer is announced."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many workers there may be; fixed where minimum and maximum are equal."""

    minimum: int
    maximum: int
    use_gpu: bool


def plan_crew(config: Config, resources: Mapping[str, float]) -> Crew:
    """Return how many training workers there may be: fixed, unless there is a minimum.

    More workers than chunks of episodes in a meta-batch would have nothing to learn from.

    Raises:
        UserError: the number is fixed, and the cluster is too small for it; or it lacks the
            precision.
    """
    cluster = config.cluster
    if cluster.min_workers is None:
        count, use_gpu = plan_workers(cluster, resources)
        return Crew(minimum=count, maximum=count, use_gpu=use_gpu)
    chunks = -(-config.outer.meta_batch_size // cluster.episodes_per_chunk)
    useful = max(cluster.min_workers, chunks)
    return Crew(
        minimum=cluster.min_workers,
        maximum=useful if cluster.num_workers == "auto" else cluster.num_workers,
        use_gpu=wants_gpu(cluster, resources),
    )


class Rest:
    """Finds when a number that changes has come to rest: nodes join one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: tuple[int, float] | None = None  # the number, and since when it is that

    def reached(self, number: int, now: float) -> bool:
        """Note the number at time ``now``; return whether it has not changed for those seconds."""
        if self._last is None or self._last[0] != number:
            self._last = (number, now)
        return now - self._last[1] >= self._seconds


class Patience:
    """Bears ``max_failures`` failures in a row; the count starts again at each checkpoint."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._count = 0
        self._step = -1

    def ends(self, step: int) -> bool:
        """Note a failure; return whether it was one too many.

        Args:
            step: of the last checkpoint.
        """
        self._count = 1 if step > self._step else self._count + 1
        self._step = step
        return self._count > self._max_failures


def find_room(
    crew: Crew, cluster: ClusterConfig, given_up: threading.Event, echo: Callable[[str], None]
) -> int:
    """Return for how many workers, up to the maximum, there is room; 0 once ``given_up`` is set.

    A long wait is announced by ``echo``.

    Raises:
        UserError: there has not been enough for ``cluster.wait_seconds``.
    """
    rest, start, announced = Rest(SETTLE_SECONDS), time.monotonic(), False
    with _reserved(crew, crew.maximum) as found:
        while not given_up.wait(_POLL_SECONDS):
            room, now = _within_slots(found(), crew), time.monotonic()
            settled = rest.reached(room, now) or room == crew.maximum
            if room >= crew.minimum and settled:
                return room
            if now - start > cluster.wait_seconds:
                raise _too_little(crew, cluster, room)
            if not announced and now - start > _ANNOUNCE_SECONDS:
                announced = True
                echo(
                    f"the Ray cluster has room for {room} worker(s): waiting for {crew.minimum},"
                    f" for {cluster.wait_seconds:g} s at most"
                )
    return 0


@contextlib.contextmanager
def growing(
    crew: Crew, workers: int, started: Callable[[], bool], ask: Callable[[], None]
) -> Iterator[None]:
    """During the block, call ``ask`` once there is room for more than ``workers``.

    Before they have ``started``, which takes room, none is looked for.
    """
    if workers == crew.maximum:
        yield
        return

    def watch(over: threading.Event) -> None:
        while not started():
            if over.wait(1):
                return
        rest, start = Rest(SETTLE_SECONDS), time.monotonic()
        # Where the cluster is gone, the workers' own failure is reported.
        with contextlib.suppress(RayError), _reserved(crew, crew.maximum - workers) as found:
            while not over.wait(_POLL_SECONDS):
                room, now = _within_slots(workers + found(), crew), time.monotonic()
                if rest.reached(room, now) and room > workers and now - start > GROW_SECONDS:
                    ask()
                    over.wait()

    with in_background(watch):
        yield


@contextlib.contextmanager
def _reserved(crew: Crew, count: int) -> Iterator[Callable[[], int]]:
    """Ask for room for ``count`` workers; yield a function that counts those that have it."""
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
    return min(room, count_slots(ray.cluster_resources(), crew.use_gpu)[0])


def _too_little(crew: Crew, cluster: ClusterConfig, room: int) -> UserError:
    key = "num_workers" if cluster.min_workers is None else "min_workers"
    return UserError(
        f"cluster.{key} is {crew.minimum} but for {cluster.wait_seconds:g} s"
        f" (cluster.wait_seconds) the Ray cluster has had room for {room} worker(s)",
        remedy="add nodes, end what else uses them, or lower it; what is trained is kept: run the"
        " same command to go on",
    )
