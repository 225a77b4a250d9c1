"""A cluster of several nodes that come and go while a run trains."""

from __future__ import annotations

import json
import os
import re
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
READER = Path(__file__).with_name("read_apart.py")
CREW = re.compile(r".*: (\d+) (CPU worker\(s\) of|worker\(s\) from outer step)")


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

    def join(self, *, cpus: int = 1, gpus: int = 0) -> subprocess.Popen[bytes]:
        """Add a node; its GPUs are in name only."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}")

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


def workers_now(folder: Path) -> int:
    """Return how many workers train, by the last row that rank 0 wrote; 0 if there is none."""
    rows = read_metrics(folder / METRICS_FILE)
    return next((row["workers"] for row in reversed(rows) if "workers" in row), 0)


def test_one_then_three_then_two_workers_end_in_the_bits_of_a_lone_process(
    nodes, tmp_path, make_config, weights, start
):
    """Two nodes join; one is told to go (SIGTERM, as from Kubernetes), one dies; then SIGTERM."""
    steps = ("outer.validate_every=100", "outer.checkpoint_every=5")
    elastic = ("cluster.num_workers=auto", "cluster.min_workers=1", "outer.num_steps=100000")
    config = make_config("run", "name=elastic", *steps, *elastic)
    folder = config.run_folder
    nodes.join()

    command = start(
        *("train", str(tmp_path / "run/config.yaml")),
        cwd=ROOT,
        RAY_ADDRESS=nodes.address,
        RAY_AUTH_MODE="disabled",
    )
    command.wait_until(lambda: workers_now(folder) == 1, "one worker")
    told, killed = nodes.join(), nodes.join()
    command.wait_until(lambda: workers_now(folder) == 3, "three workers")
    told.send_signal(signal.SIGTERM)
    command.wait_until(lambda: workers_now(folder) == 2, "two workers")
    kill_with_children(killed)
    command.wait_until(lambda: workers_now(folder) == 1, "one worker again")
    command.terminate()

    assert command.finish() == 143, command.errors
    stopped_at = list_steps(folder)[-1]
    assert trained_steps(folder) == stopped_at
    assert command.errors == ""
    sizes = [int(found[1]) for line in command.lines if (found := CREW.match(line))]
    assert sizes in ([1, 3, 2, 1], [1, 2, 3, 2, 1])  # the nodes did not join at one time
    assert command.lines[-1].endswith(
        f": stopped before outer step {stopped_at} of 100000, and"
        " saved; run the same command to go on"
    )
    lone = make_config("run", "name=lone", *steps, f"outer.num_steps={stopped_at}")
    assert train_locally(lone, lambda _line: None)
    assert_same_bits(weights(folder), weights(lone.run_folder))


def test_readers_keep_away_from_the_learners_node_while_there_is_another(
    nodes, tmp_path, make_config
):
    make_config("run", "data.materialize=true")
    nodes.join(cpus=1, gpus=1)
    apart = nodes.join()
    places = tmp_path / "places"
    places.mkdir()
    with subprocess.Popen(
        [sys.executable, READER, tmp_path / "run/config.yaml", places],
        env={**nodes.environment, "RAY_ADDRESS": nodes.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        try:
            assert json.loads(reader.stdout.readline()) == "gpu"
            assert json.loads(reader.stdout.readline()) == 20  # of 20 meta-batches, bit by bit
            before = json.loads(reader.stdout.readline())
            assert set(before) == {"cpu"}
            assert 20 <= len(before) < 40  # it reads ahead, not everything

            kill_with_children(apart)
            reader.stdin.write("go on\n")
            reader.stdin.flush()
            assert json.loads(reader.stdout.readline()) == 20
            after = json.loads(reader.stdout.readline())
            assert set(after[:20]) == {"cpu"}
            assert after[-1] == "gpu"
            assert reader.wait(timeout=300) == 0
        finally:
            kill_with_children(reader)
