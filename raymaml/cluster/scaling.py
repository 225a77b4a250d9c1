"""Real runs with some numbers of workers, for the cost model to be compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from raymaml.cluster.runtime import connected
from raymaml.cluster.train import train_on_cluster
from raymaml.config.schema import Config


def timed_runs(configs: Sequence[Config], cpus: int) -> Iterator[float]:
    """Train one config after the other and yield the seconds of each run.

    All on one cluster: the one that RAY_ADDRESS names, or one of ``cpus`` logical CPUs here, which
    may be more than there are cores.
    """
    with connected(configs[0].cluster, num_cpus=cpus):
        for config in configs:
            start = time.perf_counter()
            train_on_cluster(config, lambda _line: None)
            yield time.perf_counter() - start
