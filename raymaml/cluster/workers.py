"""How many workers the Ray cluster can run, and what each of them reserves."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig
from raymaml.training.session import require_precision

WORKER_CPUS = 0.9
"""Logical CPUs of one CPU training worker..."""
READER_CPUS = 0.1
"""...and of the Ray Data task that reads for it: together one core. A cluster whose CPUs are all
held by workers would leave its reading tasks waiting for ever."""


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
