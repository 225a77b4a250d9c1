"""Ray Train: the same bits as a lone process, whatever the workers and whatever befalls them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from helpers_cluster import assert_same_bits, attempts, pids, trained_steps, wait_until

from raymaml.cluster.train import train_on_cluster
from raymaml.cluster.trainer import RAY_SNAPSHOT
from raymaml.errors import UserError
from raymaml.training.data import training_episodes
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray


def quiet(_line: str) -> None:
    pass


EVERYTHING = (  # that is drawn, accumulated or kept from step to step
    "model.norm=running",
    "model.head=shared",
    "inner.momentum=0.5",
    "inner.gradient=checkpointed",
    "outer.optimizer=rmsprop",
    "outer.warmup_steps=3",
    "data.augment.train.support=crop",
    "data.augment.train.query=resize",
    "data.augment.val.query=crop",
)


CHUNKS = ("inner.gradient=mixed_mode", "cluster.episodes_per_chunk=2")


@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (3, ("outer.meta_batch_size=4", *EVERYTHING)),  # 2 + 1 + 1
        (2, ("outer.meta_batch_size=4", *CHUNKS)),  # a chunk of 2 each
        (2, ("outer.meta_batch_size=1",)),  # 1 + 0: a worker that only helps to validate
    ],
)
def test_workers_end_in_the_bits_of_a_lone_process(
    cluster, make_config, weights, num_workers, options
):
    # 7 steps of 4 are 28 of 24 episodes: the stream goes round again in the last step
    steps = ("outer.num_steps=7", f"cluster.num_workers={num_workers}", *options)
    lone = make_config("run", "name=lone", *steps)
    together = make_config("run", "name=together", *steps)
    assert train_locally(lone, quiet)

    assert train_on_cluster(together, quiet)

    assert_same_bits(weights(together.run_folder), weights(lone.run_folder))


@pytest.mark.fault("worker killed")
def test_a_killed_worker_is_replaced_and_the_bits_stay(cluster, make_config, weights):
    steps = ("outer.num_steps=120", "outer.validate_every=10", "cluster.num_workers=2")
    lone = make_config("run", "name=lone", *steps)
    killed = make_config("run", "name=killed", *steps)
    assert train_locally(lone, quiet)
    killed_at: list[int] = []

    def kill_one() -> None:
        wait_until(lambda: trained_steps(killed.run_folder) >= 15, "at step 15")
        os.kill(pids("RayTrainWorker")[-1], signal.SIGKILL)
        killed_at.append(trained_steps(killed.run_folder))

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert train_on_cluster(killed, quiet)
    killer.join()

    assert 15 <= killed_at[0] < 120
    assert attempts(killed.run_folder) == 2
    assert_same_bits(weights(killed.run_folder), weights(lone.run_folder))


def test_a_worker_that_is_told_to_go_has_the_run_saved_first(cluster, make_config, weights):
    """No step is done twice, and it is no failure: none is allowed here."""
    steps = ("outer.num_steps=120", "outer.validate_every=60", "cluster.max_failures=0")
    lone = make_config("run", "name=lone", *steps)
    told = make_config("run", "name=told", *steps, "cluster.num_workers=2")
    assert train_locally(lone, quiet)
    lines: list[str] = []

    def tell_one() -> None:
        wait_until(lambda: trained_steps(told.run_folder) >= 15, "at step 15")
        os.kill(pids("RayTrainWorker")[-1], signal.SIGTERM)

    teller = threading.Thread(target=tell_one)
    teller.start()
    assert train_on_cluster(told, lines.append)
    teller.join()

    assert attempts(told.run_folder) == 2
    steps_done = [line.split()[1] for line in lines if "  loss " in line and "valid" not in line]
    assert len(steps_done) == len(set(steps_done)) == 120
    assert_same_bits(weights(told.run_folder), weights(lone.run_folder))


def test_a_cluster_without_room_is_one_message(cluster, make_config):
    config = make_config("run", "cluster.num_workers=2", "cluster.wait_seconds=0.5")
    import ray

    taken = ray.util.placement_group([{"CPU": 3}])
    assert taken.wait(240)
    try:
        with pytest.raises(UserError) as raised:
            train_on_cluster(config, quiet)
    finally:
        ray.util.remove_placement_group(taken)

    assert str(raised.value).startswith(
        "cluster.num_workers is 2 but for 0.5 s (cluster.wait_seconds) the Ray cluster has had room"
        " for 1 worker(s); add nodes, end what else uses them, or lower it"
    )


@pytest.mark.fault("checkpoint torn")
def test_a_torn_ray_snapshot_does_not_matter_and_a_finished_run_stays_as_it_is(
    cluster, make_config, weights
):
    lone = make_config("run", "name=lone")
    half = make_config("run", "name=resumed", "outer.num_steps=3")
    whole = make_config("run", "name=resumed")
    assert train_locally(lone, quiet)
    assert train_locally(half, quiet)
    (half.run_folder / RAY_SNAPSHOT).write_text('{"ray_version": "2.6')

    assert train_on_cluster(whole, quiet)  # steps 3, 4, 5

    assert_same_bits(weights(whole.run_folder), weights(lone.run_folder))

    lines: list[str] = []
    before = contents(whole.run_folder)
    assert train_on_cluster(whole, lines.append)

    assert contents(whole.run_folder) == before
    assert [line for line in lines if line.startswith("step")] == []


def test_a_run_folder_has_one_driver(make_config):
    config = make_config()
    config.run_folder.mkdir(parents=True)
    with (
        FileLock(config.run_folder / ".lock"),
        pytest.raises(UserError, match="another process is writing this run"),
    ):
        train_on_cluster(config, quiet)


@pytest.mark.fault("NaN: training")
def test_a_user_error_of_all_workers_is_shown_and_not_tried_again(cluster, make_config):
    rates = ("inner.lr=1e30", "evaluation.inner.lr=0.1")  # training alone is not finite
    config = make_config("run", *rates, "cluster.num_workers=2")

    with pytest.raises(UserError) as raised:
        train_on_cluster(config, quiet)

    # every worker sees the outcomes of all; this seed's training starts with episodes 5, 6 and 7
    assert training_episodes(config, 0) == [5, 6, 7]
    message = "outer step 0: training episode 5 gave a loss or gradient that is not finite; "
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(message)
    assert attempts(config.run_folder) == 1


@pytest.mark.fault("checkpoint damaged")
def test_a_user_error_of_one_worker_ends_the_others(cluster, make_config):
    """Rank 0 finds a damaged checkpoint in its way; rank 1 waits for its next gradients."""
    config = make_config(
        "run", "outer.num_steps=80", "outer.validate_every=40", "cluster.num_workers=2"
    )
    in_the_way = config.run_folder / "checkpoint_00000040"

    def put_in_the_way(line: str) -> None:
        if line.startswith("step") and not in_the_way.exists():
            assert trained_steps(config.run_folder) < 40
            in_the_way.mkdir()
            (in_the_way / "checkpoint.json").write_text("{")

    with pytest.raises(UserError) as raised:
        train_on_cluster(config, put_in_the_way)

    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(f"{in_the_way / 'checkpoint.json'}: is damaged")
    assert attempts(config.run_folder) == 1


def contents(folder: Path) -> dict[str, bytes | int]:
    """Return what the metrics say, and when each file of a checkpoint was written."""
    files = sorted(folder.glob("checkpoint_*/*"))
    written: dict[str, bytes | int] = {str(file): file.stat().st_mtime_ns for file in files}
    return {**written, "metrics": (folder / "metrics.jsonl").read_bytes()}
