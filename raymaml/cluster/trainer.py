"""Ray Train's workers: how they are started, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from raymaml.cluster.explain import StopAtUserErrors
from raymaml.cluster.gauges import TRAINING, Gauges
from raymaml.cluster.internals import at_worker_start, is_draining
from raymaml.cluster.runtime import in_background
from raymaml.cluster.session import RaySession, as_arrow
from raymaml.cluster.workers import worker_resources
from raymaml.common.logs import is_verbose
from raymaml.config.schema import Config
from raymaml.storage.files import remove
from raymaml.storage.place import Place
from raymaml.training.run import open_run, request_stop
from raymaml.training.session import Ask, EndedEarly
from raymaml.training.worker import train_worker

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
STARTED = ".started"
"""A file in the run folder once workers are running."""
_DRAIN_SECONDS = 2.0
"""Between two looks whether a worker's node is to leave."""


def build_trainer(
    config: Config,
    num_workers: int,
    use_gpu: bool,
    *,
    start_attempts: int,
    ask: Ask | None = None,
    stop: Place | None = None,
) -> Any:
    """Return a ``TorchTrainer`` whose workers train from the last checkpoint on until they end.

    They end when all is done and when they are asked to stop; they have saved where they stand
    then. A failure is not tried again.

    Args:
        config: of the run.
        num_workers: number of workers.
        use_gpu: a GPU each.
        start_attempts: minutes to wait for room for the workers.
        ask: for a trial of a sweep: rank 0 calls it with each validation of this process.
        stop: the folder in which a stop of the trial is asked for. Other runs have their run
            folder, where workers ask for it that are asked to leave, as processes or with a node.
    """
    folder = config.run_folder
    # Ray Train's own memory of earlier checkpoints goes; ours are found by their folders. Ray
    # writes it in place: a kill can tear it, and then no later run starts. It also names
    # checkpoints that are dropped since.
    remove(folder / RAY_SNAPSHOT)
    path, filesystem = as_arrow(folder.parent)
    leave = at_worker_start(partial(_stop_at_sigterm, folder.absolute())) if ask is None else []
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config,
            "directory": str(Path.cwd()),
            "ask": ask,
            "stop": (stop or folder).absolute(),
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(use_gpu),
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=config.cluster.timeout
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[StopAtUserErrors(), *leave],
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=start_attempts),
            logging_config=LoggingConfig(log_level="INFO" if is_verbose() else "ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    config: Config = job["config"]
    os.chdir(job["directory"])
    run = open_run(config, get_device())
    steps, cluster = config.steps.num_steps, config.cluster
    options = {"fast": cluster.reduction == "fast", "ask": job["ask"]}
    session = RaySession(job["stop"], run.data, steps, cluster.timeout, **options)
    gauges, workers = Gauges(TRAINING, config.name), {"workers": session.world_size}

    def show(row: Mapping[str, Any]) -> None:
        gauges({**workers, **row})

    leaving: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if job["ask"] is None:
        (run.folder / STARTED).touch()
        leaving = in_background(partial(_stop_when_drained, run.folder))
    with leaving, contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None, show=show)


def _stop_at_sigterm(folder: Place) -> None:
    """At SIGTERM this worker asks for a stop; a second one ends it as usual."""
    usual = signal.getsignal(signal.SIGTERM)

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, usual)
        request_stop(folder)

    signal.signal(signal.SIGTERM, handle)


def _stop_when_drained(folder: Place, over: threading.Event) -> None:
    """Ask for a stop once the node of this worker is to leave the cluster.

    A node leaves after ``ray drain-node``, by an autoscaler, or when its ``ray start --block`` gets
    SIGTERM.
    """
    node = ray.get_runtime_context().get_node_id()
    while not over.wait(_DRAIN_SECONDS):
        if is_draining(node):
            request_stop(folder)
            return
