"""Workers: what each reserves, how many the Ray cluster can run, and how many it has room for now.

For room each worker asks the scheduler by a placement group. A table of nodes would not do: it lags
some 15 s behind a node that dies, does not show other users of the cluster, and counts nodes that
drain. A group exists only once its node has answered; a group that waits shows an autoscaler the
demand.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group

from raymaml.cluster.runtime import in_background
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig
from raymaml.training.settings import require_precision

WORKER_CPUS = 0.9
"""Logical CPUs of one CPU training worker..."""
READER_CPUS = 0.1
"""...and of the Ray Data task that reads for it: together one core. A cluster whose CPUs are all
held by workers would leave its reading tasks waiting for ever."""
SETTLE_SECONDS = 2.0
"""Nodes that are ordered together join one after the other: workers start once none has joined for
this long."""
GROW_SECONDS = 20.0
"""A new crew costs some 10 s without training: workers train at least this long before they are
replaced by more."""
_ANNOUNCE_SECONDS = 5.0
"""A wait that is longer is announced."""
_POLL_SECONDS = 0.2


def plan_workers(cluster: ClusterConfig, resources: Mapping[str, float]) -> tuple[int, bool]:
    """Return the number of training workers and whether they use GPUs.

    Args:
        cluster: what the config asks for.
        resources: total resources of the Ray cluster, by name.

    Raises:
        UserError: the cluster is smaller than what is asked for, or lacks the precision.
    """
    use_gpu = wants_gpu(cluster, resources)
    slots, kind = count_slots(resources, use_gpu)
    if slots == 0:
        raise UserError(
            f"cluster.device is {cluster.device} but the Ray cluster has no {kind}",
            remedy="set cluster.device to what there is, or auto",
        )
    if cluster.num_workers == "auto":
        return slots, use_gpu
    if cluster.num_workers > slots:
        raise UserError(
            f"cluster.num_workers is {cluster.num_workers} but the Ray cluster has {slots} {kind}",
            remedy=f"use at most {slots}, or auto",
        )
    return cluster.num_workers, use_gpu


def slots_of_cluster(cluster: ClusterConfig) -> tuple[int, bool]:
    """Return how many workers the Ray cluster that is joined can run at once, and whether on GPUs.

    Raises:
        UserError: none, or it lacks the precision.
    """
    return plan_workers(cluster.model_copy(update={"num_workers": "auto"}), ray.cluster_resources())


def worker_resources(use_gpu: bool) -> dict[str, float]:
    """Return what one training worker reserves."""
    return {"GPU": 1, "CPU": WORKER_CPUS} if use_gpu else {"CPU": WORKER_CPUS}


def wants_gpu(cluster: ClusterConfig, resources: Mapping[str, float]) -> bool:
    """Return whether workers use GPUs.

    Raises:
        UserError: the workers would lack the precision.
    """
    has_gpu = resources.get("GPU", 0) >= 1
    use_gpu = cluster.device == "cuda" or (cluster.device == "auto" and has_gpu)
    require_precision(cluster, use_gpu)
    return use_gpu


def count_slots(resources: Mapping[str, float], use_gpu: bool) -> tuple[int, str]:
    """Return how many workers fit into ``resources``, and what limits them."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if not use_gpu:
        return cpus, "CPU cores"
    # A worker on a GPU takes a CPU core as well.
    return (cpus, "CPU cores for its GPUs") if cpus < gpus else (gpus, "GPUs")


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many workers there may be; fixed where minimum and maximum are equal."""

    minimum: int
    maximum: int
    use_gpu: bool


def plan_crew(cluster: ClusterConfig, meta_batch_size: int, resources: Mapping[str, float]) -> Crew:
    """Return how many training workers there may be: fixed, unless there is a minimum.

    More workers than chunks of episodes in a meta-batch would have nothing to learn from.

    Raises:
        UserError: the number is fixed, and the cluster is too small for it; or it lacks the
            precision.
    """
    if cluster.min_workers is None:
        count, use_gpu = plan_workers(cluster, resources)
        return Crew(minimum=count, maximum=count, use_gpu=use_gpu)
    chunks = -(-meta_batch_size // cluster.episodes_together)
    useful = max(cluster.min_workers, chunks)
    return Crew(
        minimum=cluster.min_workers,
        maximum=useful if cluster.num_workers == "auto" else cluster.num_workers,
        use_gpu=wants_gpu(cluster, resources),
    )


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
    announced = False
    with contextlib.closing(_rooms(crew, 0, given_up)) as rooms:
        for room, settled, waited in rooms:
            if room >= crew.minimum and (settled or room == crew.maximum):
                return room
            if waited > cluster.wait_seconds:
                key = "num_workers" if cluster.min_workers is None else "min_workers"
                raise UserError(
                    f"cluster.{key} is {crew.minimum} but for {cluster.wait_seconds:g} s"
                    f" (cluster.wait_seconds) the Ray cluster has had room for {room} worker(s)",
                    remedy="add nodes, end what else uses them, or lower it; what is trained is"
                    " kept: run the same command to go on",
                )
            if not announced and waited > _ANNOUNCE_SECONDS:
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
        # Where the cluster is gone, the workers' own failure is reported.
        with (
            contextlib.suppress(RayError),
            contextlib.closing(_rooms(crew, workers, over)) as rooms,
        ):
            for room, settled, waited in rooms:
                if settled and room > workers and waited > GROW_SECONDS:
                    ask()
                    over.wait()

    with in_background(watch):
        yield


def _rooms(
    crew: Crew, workers: int, over: threading.Event
) -> Generator[tuple[int, bool, float], None, None]:
    """Look for room beside that of ``workers`` until ``over`` is set.

    Yields:
        For how many workers there is room; whether that has come to rest; for how long it has been
        looked for, in seconds.
    """
    start = since = time.monotonic()
    last = -1
    others = crew.maximum - workers
    groups = [placement_group([worker_resources(crew.use_gpu)]) for _ in range(others)]
    try:
        while not over.wait(_POLL_SECONDS):
            table = placement_group_table()
            states = (table.get(group.id.hex(), {}).get("state") for group in groups)
            found = workers + sum(state == "CREATED" for state in states)
            # A CPU worker reserves a little less than a core, for the sake of its reader.
            room = min(found, count_slots(ray.cluster_resources(), crew.use_gpu)[0])
            now = time.monotonic()
            if room != last:
                last, since = room, now
            yield room, now - since >= SETTLE_SECONDS, now - start
    finally:
        for group in groups:
            remove_placement_group(group)
