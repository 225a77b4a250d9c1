"""The nodes of a Ray cluster, each asked by a process on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymaml.common.errors import UserError, last_line

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds to wait for a node to answer; the start of a process there takes some of them."""


def on_every_node(
    function: Callable[[Mapping[str, float]], T],
) -> Iterator[tuple[str, T | UserError]]:
    """Call ``function`` in a process on each node, on all at once.

    Args:
        function: is given what Ray counts on its node: ``CPU``, ``GPU``, and ``memory`` and
            ``object_store_memory`` in bytes.

    Yields:
        The name of each node, and its answer, or an error if there is none.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for number, node in enumerate((node for node in ray.nodes() if node["Alive"]), start=1):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=there).remote(node["Resources"])
        asked[f"node {number} ({node['NodeManagerAddress']})"] = reference
    for name, reference in asked.items():
        try:
            answer: T | UserError = ray.get(reference, timeout=PATIENCE)
        except Exception as error:
            answer = UserError(
                f"it cannot run raymaml ({last_line(error)})",
                remedy="install raymaml there, or submit the command as a job (launch/submit.sh),"
                " which brings the code along",
            )
        yield name, answer
