"""Nodes that come, go and die, with workers, objects, Ray Train's controller or the head; chaos."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_cluster import attempts, trained_steps
from helpers_faults import copied, quiet
from machinery import HERE as CHAOS
from machinery import ROOT, Command, Nodes, find, kill, wait_until

from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_test import plan_test
from raymaml.training.checkpoint import list_steps
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

CREW = re.compile(r".*: (\d+) (CPU worker\(s\) of|worker\(s\) from outer step)")


@pytest.fixture
def nodes(short_folder: Path) -> Iterator[Nodes]:
    """A head without CPUs and two nodes of one each: what runs, runs on those."""
    cluster = Nodes(short_folder / "lost", 0, 1, 1)
    yield cluster
    cluster.close()


@pytest.mark.timeout(1200)
@pytest.mark.fault("node lost")
@pytest.mark.fault("controller killed")
@pytest.mark.fault("head killed")
@pytest.mark.fault("node lost for good")
def test_what_is_lost_and_replaced_leaves_no_trace(nodes, tmp_path, make_config, same_as_alone):
    """A node is lost and replaced; Ray Train's controller; the head with all nodes; a node again,
    for good."""
    steps = ("outer.num_steps=200", "outer.validate_every=5", "cluster.num_workers=2")
    config = make_config("run", "name=lost", *steps)
    train = partial(nodes.command, "train", str(tmp_path / "run/config.yaml"))
    nodes.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"

    def at_step(step: int, command: Command) -> None:
        command.wait_until(lambda: trained_steps(config.run_folder) >= step, f"at {step}")

    command = train()
    at_step(15, command)
    nodes.kill_node()
    before = list_steps(config.run_folder)[-1]
    nodes.join()
    wait_until(lambda: attempts(config.run_folder) == 2, "at the second attempt")
    at_step(before + 15, command)  # the same command went on by itself

    kill(find(nodes, "controller"))
    assert_cluster_failed(command, str(config.run_folder), "everything up to the last checkpoint")
    before = list_steps(config.run_folder)[-1]
    command = train()
    at_step(before + 15, command)
    nodes.kill_head()
    assert_cluster_failed(command, str(config.run_folder), "everything up to the last checkpoint")

    nodes.restart()
    before = list_steps(config.run_folder)[-1]
    command = train("cluster.wait_seconds=10")
    at_step(before + 15, command)
    nodes.kill_node()
    assert command.finish() == 2
    (line,) = command.errors.splitlines()
    assert line.startswith("raymaml: cluster.num_workers is 2 but for 10 s (cluster.wait_seconds)")
    assert "has had room for 1 worker(s); add nodes, end what else uses them, or lower it" in line
    assert list_steps(config.run_folder)[-1] < 200

    nodes.join()
    command = train()
    assert command.finish() == 0, command.errors
    same_as_alone(config, *steps)


def assert_cluster_failed(command: Command, folder: str, kept: str) -> None:
    """The command ends with one message."""
    assert command.finish() == 2
    (line,) = command.errors.splitlines()
    assert line.startswith(f"raymaml: {folder}")
    assert ": the cluster failed, last with: " in line
    assert f"; {kept} is kept: look whether its head lives, and run the same command" in line


def workers_now(folder: Path) -> int:
    """Return how many workers train, by the last row that rank 0 wrote; 0 if there is none."""
    rows = read_metrics(folder / METRICS_FILE)
    return next((row["workers"] for row in reversed(rows) if "workers" in row), 0)


def test_crews_that_grow_and_shrink_end_in_the_bits_of_a_lone_process(
    nodes, tmp_path, make_config, same_as_alone
):
    """A node joins, and is told to go (SIGTERM, as from Kubernetes); one dies; then SIGTERM."""
    steps = ("outer.validate_every=100", "outer.checkpoint_every=5")
    elastic = ("cluster.num_workers=auto", "cluster.min_workers=1", "outer.num_steps=100000")
    config = make_config("run", "name=elastic", *steps, *elastic)
    folder = config.run_folder

    command = nodes.command("train", str(tmp_path / "run/config.yaml"))
    command.wait_until(lambda: workers_now(folder) == 2, "two workers")
    told = nodes.join()
    command.wait_until(lambda: workers_now(folder) == 3, "three workers")
    told.send_signal(signal.SIGTERM)
    command.wait_until(lambda: workers_now(folder) == 2, "two workers again")
    nodes.kill_node()
    command.wait_until(lambda: workers_now(folder) == 1, "one worker")
    command.terminate()

    assert command.finish() == 143, command.errors
    stopped_at = list_steps(folder)[-1]
    assert trained_steps(folder) == stopped_at
    assert command.errors == ""
    sizes = [int(found[1]) for line in command.lines if (found := CREW.match(line))]
    assert sizes == [2, 3, 2, 1]
    assert command.lines[-1].endswith(
        f": stopped before outer step {stopped_at} of 100000, and"
        " saved; run the same command to go on"
    )
    same_as_alone(config, *steps, f"outer.num_steps={stopped_at}")


SWEEP = """\
name: s
title: A sweep
config: config.yaml
space: {model.norm: {grid: [transductive, context]}}
scheduler: none
set: {outer.num_steps: 100000, outer.validate_every: 20}
max_concurrent_trials: 1
"""


@pytest.mark.fault("head killed")
def test_a_campaign_and_a_sweep_whose_head_is_killed_end_with_one_message(
    nodes, tmp_path, make_config
):
    """Both run at once, on a core each; the campaign then ends in the records of a lone process."""
    several = ("episodes.test.num_episodes=1000", "evaluation.chunk_size=20")
    config = make_config("run", "outer.num_steps=1", "cluster.num_workers=1", *several)
    assert train_locally(config, quiet)
    alone = copied(config, "alone", config.run_dir)
    judge_locally(partial(plan_test, alone), alone.cluster, quiet)
    make_config("swept")
    (tmp_path / "swept/s.yaml").write_text(SWEEP, encoding="utf-8")

    def judged() -> int:
        return len(list((config.run_folder / "test").glob("*/*/*.parquet")))

    test = partial(nodes.command, "test", str(tmp_path / "run/config.yaml"))
    sweep = nodes.command("sweep", str(tmp_path / "swept/s.yaml"))
    sweep.wait_until(lambda: any("  validation accuracy " in line for line in sweep.lines), "swept")
    campaign = test()
    campaign.wait_until(lambda: judged() >= 2, "judging")
    nodes.kill_head()

    assert_cluster_failed(campaign, "", "every finished chunk")
    assert_cluster_failed(sweep, "", "what the trials have saved")

    before = judged()
    nodes.restart()
    again = test()
    assert again.finish() == 0, again.errors
    assert judged() > before
    for one, other in zip(
        *(plan_test(each, torch.device("cpu")).results() for each in (config, alone)), strict=True
    ):
        tables = [each.records.drop(["seconds"]) for each in (one, other)]
        assert tables[0].equals(tables[1], check_metadata=True), one.name


STREAM = """
import json, sys
from itertools import islice
from pathlib import Path
import ray, torch
from raymaml.cluster import stream
from raymaml.config.load import load_config
from raymaml.training.data import open_training_data
from raymaml.types import tensors_of

config, places = map(Path, sys.argv[1:])
read = stream.read_steps

def recording(block, **options):
    node = ray.get_runtime_context().get_node_id()
    (places / f"{block['start'][0]}-{node}").touch()
    return read(block, **options)

stream.read_steps, stream.PIXELS_AT_ONCE = recording, 400_000
ray.init(address="auto", log_to_driver=False)
print(json.dumps([node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]))
data = open_training_data(load_config(config), torch.device("cpu"))
found = stream.stream_meta_batches(data, range(800), 0, 1, 200)
expected = data.meta_batches(0, 0, 1)
for step, (one, other) in enumerate(zip(found, islice(expected, 800), strict=True)):
    for name, tensor in tensors_of(one).items():
        assert torch.equal(tensor, vars(other)[name]), (step, name)
    if step == 10:
        print("streaming", flush=True)
        sys.stdin.readline()
print("equal", step + 1, flush=True)
"""


@pytest.mark.fault("object lost")
def test_readers_keep_away_from_gpus_and_lost_objects_are_made_again(nodes, tmp_path, make_config):
    """800 steps of 3 episodes of 2.3 kB: 14 blocks of 400 kB, in the stores of two nodes. When
    these are lost, only that with the GPU is left."""
    make_config("run", "data.materialize=true", "episodes.train.num_episodes=300")
    nodes.join(gpus=1)
    places = tmp_path / "places"
    places.mkdir()
    with (tmp_path / "errors.txt").open("wb") as errors:
        reader = subprocess.Popen(
            [sys.executable, "-c", STREAM, str(tmp_path / "run/config.yaml"), str(places)],
            env={**nodes.environment, "RAY_ADDRESS": nodes.address},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )

    def readers() -> set[str]:
        return {path.name.split("-")[1] for path in places.iterdir()}

    assert reader.stdout is not None
    first = reader.stdout.readline()
    assert first, (tmp_path / "errors.txt").read_text()
    (gpu,) = json.loads(first)
    assert reader.stdout.readline() == "streaming\n", (tmp_path / "errors.txt").read_text()
    assert readers()
    assert gpu not in readers()
    nodes.kill_node()
    nodes.kill_node()
    out, _ = reader.communicate("\n", timeout=240)
    said = (tmp_path / "errors.txt").read_text()
    assert "equal 800" in out.splitlines(), said  # among what Ray says of its nodes
    assert "lost objects by resubmitting their tasks" in said
    assert gpu in readers()


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_hundred_random_kills_change_no_bit(short_folder):
    ended = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "100", "--folder", str(short_folder / "chaos")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all weights and records are those of the undisturbed run" in ended.stdout
