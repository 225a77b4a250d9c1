"""Faults under Ray: what is tried again ends in the same bits, what is not is one message."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import pytest
from helpers_cluster import at_step, attempts, pids, trained_steps
from helpers_faults import quiet, stands_whole
from machinery import wait_until

from raymaml.cluster.campaign import judge_on_cluster
from raymaml.cluster.train import train_on_cluster
from raymaml.common.errors import UserError
from raymaml.evaluation.run_test import plan_test
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

LONG = ("outer.num_steps=100", "outer.validate_every=10", "cluster.num_workers=2")


def signal_worker(number: int) -> None:
    os.kill(pids("RayTrainWorker")[-1], number)


@pytest.mark.fault("worker slow")
@pytest.mark.fault("worker killed")
@pytest.mark.fault("worker hangs")
def test_workers_that_leave_stand_still_die_and_hang_leave_no_trace(
    cluster, make_config, same_as_alone
):
    """One run of two workers: SIGTERM, three seconds of SIGSTOP, SIGKILL, SIGSTOP for good."""
    steps = ("outer.num_steps=200", "outer.validate_every=25", "cluster.timeout=30")
    config = make_config("run", "name=disturbed", *steps, "cluster.num_workers=2")
    folder, lines = config.run_folder, []

    def after(step: int, attempt: int) -> None:
        """Wait until a crew has taken over, and has trained a little."""
        wait_until(lambda: attempts(folder) >= attempt, f"at attempt {attempt}")
        wait_until(lambda: trained_steps(folder) >= step + 5, f"five steps after {step}")

    def disturb() -> None:
        signal_worker(signal.SIGTERM)
        after(15, attempt=2)
        rows = [line for line in lines if "  loss " in line and "validation" not in line]
        done = [row.split()[1] for row in rows]
        assert len(done) == len(set(done)) >= 15  # the run was saved first: no step is done twice

        worker = pids("RayTrainWorker")[-1]
        os.kill(worker, signal.SIGSTOP)
        before = trained_steps(folder)
        threading.Event().wait(3)  # the fault itself: three seconds without this worker
        assert trained_steps(folder) - before <= 1  # the step it was in
        os.kill(worker, signal.SIGCONT)
        after(before, attempt=2)
        assert attempts(folder) == 2  # it was waited for

        signal_worker(signal.SIGKILL)
        after(trained_steps(folder), attempt=3)
        assert attempts(folder) == 3
        signal_worker(signal.SIGSTOP)  # the other waits for it in a collective

    with at_step(folder, 15, disturb):
        assert train_on_cluster(config, lines.append)

    assert attempts(folder) >= 4  # a new one, still importing, can take that long too
    same_as_alone(config, *steps)


@pytest.mark.fault("worker hangs")
def test_a_worker_alone_that_hangs_is_replaced(cluster, make_config, same_as_alone, monkeypatch):
    """The controller gets no answer."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "15")
    steps = LONG[:2]
    hung = make_config("run", "name=hung", *steps)

    with at_step(hung.run_folder, 15, lambda: signal_worker(signal.SIGSTOP)):
        assert train_on_cluster(hung, quiet)

    assert attempts(hung.run_folder) >= 2  # a new one, still importing, can take that long too
    same_as_alone(hung, *steps)


@pytest.mark.fault("out of memory")
def test_memory_that_a_trial_does_not_get_ends_the_campaign(cluster, make_config):
    # 3 * 7 query images at test, 3 * 2 in training: more than 10 are too many
    model = 'model={encoder: "helpers_faults:Hungry", encoder_args: {enough: 10}, norm: none}'
    config = make_config("run", model, "outer.num_steps=1", "episodes.test.num_queries=7")
    assert train_locally(config, quiet)
    lines: list[str] = []

    with pytest.raises(UserError) as caught:
        judge_on_cluster(partial(plan_test, config), config.cluster, lines.append)

    (problem,) = caught.value.problems
    assert ": out of memory (" in problem
    assert "fewer episodes.test.num_queries" in problem
    assert len(lines) == 1  # the settings, and no chunk
    assert not list(config.run_folder.glob("test/*/*/*.parquet"))


@pytest.mark.fault("shard corrupted: while training")
def test_a_shard_that_is_cut_while_ray_data_reads_it_is_named(cluster, make_config):
    config = make_config("run", *LONG, "episodes.train.num_episodes=600")
    shard = config.data.shards / "train" / "shard-00000.arrow"

    def cut() -> None:
        os.truncate(shard, shard.stat().st_size // 2)

    with at_step(config.run_folder, 5, cut), pytest.raises(UserError) as caught:
        train_on_cluster(config, quiet)

    (problem,) = caught.value.problems
    assert problem.startswith(f"{shard}: is of another size while it is in use; put it back")
    assert attempts(config.run_folder) == 1
    stands_whole(config.run_folder)
