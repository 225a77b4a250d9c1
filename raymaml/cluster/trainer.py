"""Ray Train's workers: how they are started, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from raymaml.cluster.explain import StopAtUserErrors, explain_failure
from raymaml.cluster.gauges import TRAINING, Gauges
from raymaml.cluster.internals import at_worker_start, is_draining
from raymaml.cluster.runtime import call_in_thread, in_background
from raymaml.cluster.session import RaySession, as_arrow
from raymaml.cluster.workers import worker_resources
from raymaml.common.errors import StorageError
from raymaml.common.logs import is_verbose
from raymaml.config.schema import Config
from raymaml.storage.files import make_folder, remove
from raymaml.storage.place import Place
from raymaml.training.run import open_run
from raymaml.training.run_folder import STOP, request_stop
from raymaml.training.session import Session
from raymaml.training.supervised import (
    ANSWER,
    QUESTION,
    Ask,
    EndedEarly,
    SupervisedSession,
    answer_by_file,
    ask_by_file,
)
from raymaml.training.worker import train_worker

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
STARTED = ".started"
"""A file in the run folder once workers are running."""
_ANSWER_EVERY = 0.1  # seconds
_DRAIN_SECONDS = 2.0
"""Between two looks whether a worker's node is to leave."""
_START_ATTEMPTS = 10
"""Minutes that a trial of a sweep waits for room for its workers; Ray's default is for ever."""


def run_crew(config: Config, folder: Place, num_workers: int, use_gpu: bool) -> None:
    """Let ``num_workers`` train until they end; a failure is not tried again.

    They end when all is done and when the run is asked to stop, as it is by a worker whose process
    or node is asked to leave; they have saved where they stand then.

    Raises:
        Exception: Ray Train's own, where workers or the cluster failed.
    """
    _forget_ray_snapshot(folder)
    trainer = _build_trainer(
        config,
        folder,
        num_workers,
        use_gpu,
        failures={"max_failures": 0, "controller_failure_limit": 1},
        callbacks=at_worker_start(partial(_stop_at_sigterm, folder.absolute())),
    )
    call_in_thread(trainer.fit)


def train_supervised(
    config: Config, num_workers: int, use_gpu: bool, ask: Ask, stop: Callable[[], bool]
) -> None:
    """Train with Ray Train's workers as a trial of a sweep, from the last checkpoint on.

    Args:
        config: the trial's.
        num_workers: so many.
        use_gpu: a GPU each.
        ask: called here with each validation; tells whether the run goes on. What it raises
            ends the workers first.
        stop: looked at now and then; the workers stop at an outer step and save when it is true.

    Raises:
        UserError: the workers met a mistake of the user's, or failed too often.
    """
    folder = config.run_folder
    make_folder(folder, "run_dir")
    _forget_ray_snapshot(folder)
    for name in (STOP, QUESTION, ANSWER):
        remove(folder / name)
    failures = {
        "max_failures": config.cluster.max_failures,
        "controller_failure_limit": _START_ATTEMPTS,
    }
    trainer = _build_trainer(
        config, folder, num_workers, use_gpu, failures=failures, supervised=True
    )
    with ThreadPoolExecutor(1) as executor:
        fit = executor.submit(_fit, trainer, folder)
        answered: str | None = None
        while not fit.done():
            # A storage that is away for a moment is asked again; where it stays away the workers
            # find that themselves.
            with contextlib.suppress(StorageError):
                if stop():
                    request_stop(folder)
                answered = answer_by_file(folder, ask, answered)
            wait([fit], timeout=_ANSWER_EVERY)
        fit.result()


def _fit(trainer: Any, folder: Place) -> None:
    """Let Ray Train run the workers; what ends the run is told as one message."""
    try:
        call_in_thread(trainer.fit)
    except Exception as error:
        raise explain_failure(error, folder) from error


def _build_trainer(
    config: Config,
    folder: Place,
    num_workers: int,
    use_gpu: bool,
    *,
    failures: dict[str, int],
    callbacks: list[Any] | None = None,
    supervised: bool = False,
) -> Any:
    path, filesystem = as_arrow(folder.parent)
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config,
            "folder": folder.absolute(),
            "directory": str(Path.cwd()),
            "supervised": supervised,
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
            callbacks=[StopAtUserErrors(), *(callbacks or [])],
            failure_config=FailureConfig(**failures),
            logging_config=LoggingConfig(log_level="INFO" if is_verbose() else "ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    config: Config = job["config"]
    folder: Place = job["folder"]
    os.chdir(job["directory"])
    run = open_run(config, get_device())
    session: Session = RaySession(folder, run.data, config.outer.num_steps, config.cluster.timeout)
    gauges, workers = Gauges(TRAINING, config.name), {"workers": session.world_size}

    def show(row: Mapping[str, Any]) -> None:
        gauges({**workers, **row})

    if job["supervised"]:
        ask = partial(ask_by_file, folder)
        session = SupervisedSession(session, ask, session.stop_requested)
        leaving: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        (folder / STARTED).touch()
        leaving = in_background(partial(_stop_when_drained, folder))
    with leaving, contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None, show=show)


def _forget_ray_snapshot(folder: Place) -> None:
    """Let Ray Train start without its own memory of earlier checkpoints.

    Ray writes that file in place: a kill can tear it, and then no later run starts; and it names
    checkpoints that we have dropped since. Ours are found by their folders.
    """
    remove(folder / RAY_SNAPSHOT)


def _stop_at_sigterm(folder: Place) -> None:
    """Have this worker ask for a stop at SIGTERM; a second one ends it as usual."""
    usual = signal.getsignal(signal.SIGTERM)

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, usual)
        request_stop(folder)

    signal.signal(signal.SIGTERM, handle)


def _stop_when_drained(folder: Place, over: threading.Event) -> None:
    """Ask for a stop once the node of this worker is to leave the cluster.

    ``ray drain-node``, an autoscaler, and a node whose ``ray start --block`` gets SIGTERM do so.
    """
    node = ray.get_runtime_context().get_node_id()
    while not over.wait(_DRAIN_SECONDS):
        if is_draining(node):
            request_stop(folder)
            return
