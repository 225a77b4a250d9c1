"""A cluster of several nodes that come and go while a run trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cluster import (
    assert_same_bits,
    free_ports,
    kill_with_children,
    start_node,
    trained_steps,
)

from raymaml.training.checkpoint import list_steps
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


class Nodes:
    """A head without CPUs, where drivers run, and nodes that join it and leave it."""

    def __init__(self, folder: Path, short_folder: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        programs = Path(sys.executable).parent
        self.environment = {
            **inherited,
            "HOME": str(folder),
            "PATH": f"{programs}:{inherited['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
        }
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        port, dashboard_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        options = (f"--port={port}", f"--dashboard-port={dashboard_port}")
        self._start("--head", "--num-cpus=0", *options, f"--temp-dir={short_folder / 'nodes'}")

    def join(self, *, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Add a node."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        output = self._folder / f"node-{len(self._started)}.txt"
        memory = "--object-store-memory=100000000"
        self._started.append(start_node(output, self.environment, memory, *options))
        return self._started[-1]

    def end(self) -> None:
        for process in reversed(self._started):
            kill_with_children(process)


@pytest.fixture
def nodes(tmp_path_factory, short_folder) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("nodes"), short_folder)
    yield cluster
    cluster.end()


def crews(folder: Path) -> list[int]:
    """Return the numbers of workers that trained, one after the other, by what rank 0 wrote."""
    rows = read_metrics(folder / METRICS_FILE)
    sizes = [row["workers"] for row in rows if "workers" in row]
    return [size for at, size in enumerate(sizes) if at == 0 or size != sizes[at - 1]]


def test_one_then_three_then_two_workers_end_in_the_bits_of_a_lone_process(
    nodes, tmp_path, make_config, weights, start
):
    """Two nodes join, one is told to go (SIGTERM, as Kubernetes does), one dies, one joins."""
    steps = ("outer.validate_every=100", "outer.checkpoint_every=20", "outer.num_steps=100000")
    elastic = ("cluster.num_workers=auto", "cluster.min_workers=1")
    config = make_config("run", "name=elastic", *steps, *elastic)
    folder = config.run_folder
    nodes.join()

    command = start(
        *("train", str(tmp_path / "run/config.yaml")),
        cwd=ROOT,
        RAY_ADDRESS=nodes.address,
        RAY_AUTH_MODE="disabled",
    )
    command.wait_until(lambda: crews(folder) == [1], "one worker")
    told, killed = nodes.join(), nodes.join()
    command.wait_until(lambda: crews(folder)[-1] == 3, "three workers")
    told.send_signal(signal.SIGTERM)
    command.wait_until(lambda: crews(folder)[-1] == 2, "two workers")
    kill_with_children(killed)
    command.wait_until(lambda: crews(folder)[-1] == 1, "one worker again")
    command.terminate()

    assert command.finish() == 143, command.errors
    assert command.errors == ""
    stopped_at = list_steps(folder)[-1]
    assert trained_steps(folder) == stopped_at
    lone = make_config("run", "name=lone", *steps[:2], f"outer.num_steps={stopped_at}")
    assert train_locally(lone, lambda _line: None)
    assert_same_bits(weights(folder), weights(lone.run_folder))
