"""A cluster of three nodes on this machine, in a process of its own: obeys lines on stdin.

``add`` starts a node, ``end`` ends all. It answers with a line of JSON: the address, and the
processes of each node that lives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

CPUS = 1
"""Of each node: one worker and its reader."""
MEMORY = 100_000_000
"""Bytes of the object store of each node."""


def main() -> None:
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    for _ in range(2):
        cluster.add_node(**options)
    answer(cluster)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        cluster.add_node(**options)
        answer(cluster)
    cluster.shutdown()


def answer(cluster: Any) -> None:
    nodes = [cluster.head_node, *cluster.worker_nodes]
    state = {"address": cluster.address, "nodes": [processes(node) for node in nodes]}
    sys.stdout.write(json.dumps(state) + "\n")
    sys.stdout.flush()


def processes(node: Any) -> dict[str, int]:
    """Return the process numbers of what makes a node, by name: ``raylet``, ``gcs_server``, ..."""
    return {
        name: infos[0].process.pid
        for name, infos in node.all_processes.items()
        if infos and infos[0].process.poll() is None
    }


if __name__ == "__main__":
    main()
