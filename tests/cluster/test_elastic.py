"""A cluster of several nodes that come and go while a run trains."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cluster import trained_steps
from machinery import Nodes, kill_with_children

from raymaml.training.checkpoint import list_steps
from raymaml.training.metrics import METRICS_FILE, read_metrics

pytestmark = pytest.mark.ray

READER = Path(__file__).with_name("read_apart.py")
CREW = re.compile(r".*: (\d+) (CPU worker\(s\) of|worker\(s\) from outer step)")


@pytest.fixture
def nodes(short_folder: Path) -> Iterator[Nodes]:
    """A head without CPUs, where drivers run; nodes join it and leave it."""
    cluster = Nodes(short_folder / "elastic", 0)
    yield cluster
    cluster.close()


def workers_now(folder: Path) -> int:
    """Return how many workers train, by the last row that rank 0 wrote; 0 if there is none."""
    rows = read_metrics(folder / METRICS_FILE)
    return next((row["workers"] for row in reversed(rows) if "workers" in row), 0)


def test_one_then_three_then_two_workers_end_in_the_bits_of_a_lone_process(
    nodes, tmp_path, make_config, same_as_alone
):
    """Two nodes join; one is told to go (SIGTERM, as from Kubernetes), one dies; then SIGTERM."""
    steps = ("outer.validate_every=100", "outer.checkpoint_every=5")
    elastic = ("cluster.num_workers=auto", "cluster.min_workers=1", "outer.num_steps=100000")
    config = make_config("run", "name=elastic", *steps, *elastic)
    folder = config.run_folder
    nodes.join()

    command = nodes.command("train", str(tmp_path / "run/config.yaml"))
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
    same_as_alone(config, *steps, f"outer.num_steps={stopped_at}")


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
