"""Streams a run's episodes on the node with the GPU, and tells where the reading tasks ran.

    RAY_ADDRESS=... python read_apart.py CONFIG    writes lines of JSON: nodes of the tasks by name

Every outer step is a reading task. Between the first half and the second it waits for a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from raymaml.cluster import stream
from raymaml.cluster.runtime import connected
from raymaml.cluster.workers import WORKER_CPUS
from raymaml.config.load import load_config
from raymaml.training.data import open_training_data

STEPS = 40


def node_names() -> dict[str, str]:
    """Name the nodes by what they have."""
    return {
        node["NodeID"]: "gpu" if node["Resources"].get("GPU") else "cpu"
        for node in ray.nodes()
        if node["Resources"].get("CPU")
    }


def place_recording_read(folder: Path) -> None:
    """Let reading tasks leave a file that is named by step and node."""
    read = stream._read

    def recording(block: Any, **options: Any) -> Any:
        node = ray.get_runtime_context().get_node_id()
        for step in block["start"].to_pylist():
            (folder / f"{step:03d}-{node}").touch()
        return read(block, **options)

    stream._read = recording


def places(folder: Path, names: dict[str, str]) -> list[str]:
    """Return the node of each task, by its name, in the order of the steps."""
    return [names[path.name.split("-")[1]] for path in sorted(folder.iterdir())]


@ray.remote(num_gpus=1, num_cpus=WORKER_CPUS)
class Learner:
    """Stands where a learner on a GPU would stand."""

    def open(self, config: Any, folder: Path) -> str:
        """Return the node it stands on."""
        stream.ROWS_AT_ONCE = stream.PIXELS_AT_ONCE = 1  # a task a step
        place_recording_read(folder)
        self._data = open_training_data(config, torch.device("cpu"))
        self._local = self._data.meta_batches(0, 0, 1)
        share = stream.Share(data=self._data, first_step=0, num_steps=STEPS, rank=0, world_size=1)
        self._batches: Iterator[Any] = stream.stream_meta_batches(share)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def take(self, steps: int) -> int:
        """Learn nothing from so many meta-batches; count those that are as read without Ray."""
        return sum(
            torch.equal(next(self._batches).support_x, next(self._local).support_x)
            for _ in range(steps)
        )


def tell(what: Any) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    folder = Path(sys.argv[2])
    with connected(config.cluster):
        names = node_names()
        learner = Learner.remote()
        tell(names[ray.get(learner.open.remote(config, folder))])
        tell(ray.get(learner.take.remote(STEPS // 2)))
        tell(places(folder, names))
        sys.stdin.readline()
        tell(ray.get(learner.take.remote(STEPS - STEPS // 2)))
        tell(places(folder, names))


if __name__ == "__main__":
    main()
