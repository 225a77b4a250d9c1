"""A cluster on this machine, in a process of its own: obeys lines on stdin.

Arguments are the CPUs of the head and of the other nodes. ``add`` starts a node of one CPU, ``end``
ends all. It answers with a line of JSON: the address, and the
processes of each node that lives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY = 100_000_000
"""Bytes of the object store of each node."""


def main() -> None:
    from ray.cluster_utils import Cluster

    head, *others = [
        {"num_cpus": int(cpus), "object_store_memory": MEMORY} for cpus in sys.argv[1:]
    ]
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for options in others:
        cluster.add_node(**options)
    answer(cluster)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
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
