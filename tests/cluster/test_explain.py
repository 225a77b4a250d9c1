"""What is told of Ray Train's errors; no cluster is started."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from raymaml.cluster.explain import StopAtUserErrors, explain_failure, user_error
from raymaml.common.errors import StorageError, UserError

FOLDER = Path("runs/it")


def from_a_worker(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, "Traceback ...")


@pytest.mark.parametrize("kind", [UserError, StorageError])
def test_a_user_error_of_any_worker_reaches_the_driver_as_it_was(kind):
    errors = {0: from_a_worker(RuntimeError("gloo")), 1: from_a_worker(kind("one", "two"))}
    with pytest.raises(kind) as caught:
        StopAtUserErrors().after_exception(None, errors)
    travelled = pickle.loads(pickle.dumps(ControllerError(caught.value)))
    assert explain_failure(travelled, FOLDER).problems == ("one", "two")


def test_other_errors_are_tried_again_and_a_worker_that_hangs_holds_nobody_up(monkeypatch):
    monkeypatch.delenv(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, raising=False)
    StopAtUserErrors().after_exception(None, {0: from_a_worker(RuntimeError("gloo"))})
    seconds = float(os.environ[TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S])
    assert seconds < DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S


def test_a_user_error_is_found_in_what_ray_data_wraps_around_it():
    wrapped = RuntimeError("UDF failed")
    wrapped.__cause__ = UserError("a shard")
    task = RayTaskError("f", "Traceback ...", wrapped)
    assert str(user_error(from_a_worker(task))) == "a shard"
    assert user_error(from_a_worker(RuntimeError("a defect"))) is None


def test_workers_that_ray_killed_for_their_memory_are_told_so():
    killed = WorkerHealthCheckFailedError("lost", RayActorError(None, "low on memory"))
    problem = str(explain_failure(WorkerGroupError("lost\nlast line", {0: killed}), FOLDER))
    assert problem == (
        f"{FOLDER}: the workers failed more often in a row than cluster.max_failures allows, last"
        " with: last line; everything up to the last checkpoint is kept: lower"
        " cluster.num_workers, if a node ran out of memory, and run the same command to go on"
    )
    other = WorkerGroupError("lost", {0: from_a_worker(RuntimeError("gloo"))})
    assert str(explain_failure(other, FOLDER)).endswith("is kept: run the same command to go on")


def test_workers_that_find_no_node_and_clusters_that_are_gone():
    late = str(explain_failure(ControllerError(WorkerGroupStartupTimeoutError(2)), FOLDER))
    assert "wait for the cluster's nodes, or lower cluster.num_workers, and run" in late
    gone = str(explain_failure(RayActorError(None, "Socket closed"), FOLDER))
    assert gone.startswith(f"{FOLDER}: the cluster failed, last with: ")
    assert gone.endswith("look whether its head lives, and run the same command to go on")
