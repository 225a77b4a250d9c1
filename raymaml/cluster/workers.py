"""How many workers a run can have: what its config asks for, and what the Ray cluster has room for.

The scheduler itself is asked for room, by a placement group for each worker. A table of nodes would
not do: it lags some 15 s behind a node that dies, does not show what else uses the cluster, and
counts nodes that drain. A group is there only once its node has answered; and one that waits shows
an autoscaler what is needed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import ray
from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group

from raymaml.cluster.runtime import in_background
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.training.crew import Crew, Rest, elastic_crew
from raymaml.training.session import require_precision

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
    use_gpu = _wants_gpu(cluster, resources)
    slots, kind = _count_slots(resources, use_gpu)
    if slots == 0:
        raise UserError(
            f"cluster.device is {cluster.device} but the Ray cluster has no {kind}; set"
            " cluster.device to what there is, or auto"
        )
    if cluster.num_workers == "auto":
        return slots, use_gpu
    if cluster.num_workers > slots:
        raise UserError(
            f"cluster.num_workers is {cluster.num_workers} but the Ray cluster has {slots} {kind};"
            f" use at most {slots}, or auto"
        )
    return cluster.num_workers, use_gpu


def slots_of_cluster(cluster: ClusterConfig) -> tuple[int, bool]:
    """Return how many workers the Ray cluster that is joined can run at once, and whether on GPUs.

    Raises:
        UserError: none, or it lacks the precision.
    """
    return plan_workers(cluster.model_copy(update={"num_workers": "auto"}), ray.cluster_resources())


def plan_crew(config: Config, resources: Mapping[str, float]) -> Crew:
    """Return how many training workers there may be.

    Raises:
        UserError: the number is fixed, and the cluster is too small for it; or it lacks the
            precision.
    """
    elastic = elastic_crew(config, _wants_gpu(config.cluster, resources))
    if elastic is not None:
        return elastic
    count, use_gpu = plan_workers(config.cluster, resources)
    return Crew(minimum=count, maximum=count, use_gpu=use_gpu)


def worker_resources(use_gpu: bool) -> dict[str, float]:
    """Return what one training worker reserves."""
    return {"GPU": 1, "CPU": WORKER_CPUS} if use_gpu else {"CPU": WORKER_CPUS}


def _wants_gpu(cluster: ClusterConfig, resources: Mapping[str, float]) -> bool:
    has_gpu = resources.get("GPU", 0) >= 1
    use_gpu = cluster.device == "cuda" or (cluster.device == "auto" and has_gpu)
    require_precision(cluster, use_gpu)
    return use_gpu


def _count_slots(resources: Mapping[str, float], use_gpu: bool) -> tuple[int, str]:
    """Return how many workers fit into ``resources``, and what limits them."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if not use_gpu:
        return cpus, "CPU cores"
    # A worker on a GPU takes a CPU core as well.
    return (cpus, "CPU cores for its GPUs") if cpus < gpus else (gpus, "GPUs")


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
    return min(room, _count_slots(ray.cluster_resources(), crew.use_gpu)[0])


def _too_little(crew: Crew, cluster: ClusterConfig, room: int) -> UserError:
    key = "num_workers" if cluster.min_workers is None else "min_workers"
    return UserError(
        f"cluster.{key} is {crew.minimum} but for {cluster.wait_seconds:g} s"
        f" (cluster.wait_seconds) the Ray cluster has had room for {room} worker(s); add nodes, end"
        " what else uses them, or lower it; what is trained is kept: run the same command to go on"
    )
