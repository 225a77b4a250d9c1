"""Ray Train's workers: how they are started, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Queue

from raymaml.cluster.explain import StopAtUserErrors, explain_failure, is_recoverable
from raymaml.cluster.gauges import TRAINING, Gauges
from raymaml.cluster.internals import at_worker_start, is_draining
from raymaml.cluster.runtime import call_in_thread, in_background
from raymaml.cluster.session import RaySession, as_arrow
from raymaml.cluster.workers import worker_resources
from raymaml.common.logs import is_verbose
from raymaml.config.schema import Config
from raymaml.storage.files import make_folder, remove
from raymaml.storage.place import Place
from raymaml.training.run import open_run
from raymaml.training.run_folder import request_stop
from raymaml.training.session import Ask, EndedEarly
from raymaml.training.state import Validation
from raymaml.training.worker import train_worker

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
STARTED = ".started"
"""A file in the run folder once workers are running."""
_DRAIN_SECONDS = 2.0
"""Between two looks whether a worker's node is to leave."""
_START_ATTEMPTS = 10
"""Minutes that a trial of a sweep waits for room for its workers; Ray's default is for ever."""


def run_crew(config: Config, num_workers: int, use_gpu: bool) -> None:
    """Train with ``num_workers`` until they end; a failure is not tried again.

    They end when all is done and when the run is asked to stop, as it is by a worker whose process
    or node is asked to leave; they have saved where they stand then.

    Raises:
        Exception: Ray Train's own, where workers or the cluster failed.
    """
    folder = config.run_folder
    _forget_ray_snapshot(folder)
    trainer = _build_trainer(
        config,
        num_workers,
        use_gpu,
        start_attempts=1,
        callbacks=at_worker_start(partial(_stop_at_sigterm, folder.absolute())),
    )
    call_in_thread(trainer.fit)


def train_trial(config: Config, num_workers: int, use_gpu: bool, ask: Ask, stop: Place) -> None:
    """Train a trial of a sweep with Ray Train's workers, from the last checkpoint on.

    Args:
        config: the trial's.
        num_workers: number of workers.
        use_gpu: a GPU each.
        ask: called here with each validation: whether the run goes on. What it raises ends the
            workers first.
        stop: the folder in which a stop is asked for.

    Raises:
        UserError: the workers met a mistake of the user's, or the cluster failed.
        Exception: Ray Train's own, where workers failed; Ray Tune tries the trial again.
    """
    folder = config.run_folder
    questions, answers = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
    make_folder(folder, "run_dir")
    _forget_ray_snapshot(folder)
    trainer = _build_trainer(
        config,
        num_workers,
        use_gpu,
        start_attempts=_START_ATTEMPTS,
        ask=partial(_ask_by_queue, questions, answers),
        stop=stop,
    )
    with ThreadPoolExecutor(1) as executor:
        fit = executor.submit(call_in_thread, trainer.fit)
        fit.add_done_callback(lambda _: questions.put(None))
        while (validation := questions.get()) is not None:
            goes_on = False
            try:
                goes_on = ask(validation)
            finally:
                answers.put(goes_on)
    if (error := fit.exception()) is not None:
        if not isinstance(error, Exception) or is_recoverable(error):
            raise error
        raise explain_failure(error, folder) from error


def _ask_by_queue(questions: Queue, answers: Queue, validation: Validation) -> bool:
    """Ask the process that started the workers whether the run goes on."""
    questions.put(validation)
    return bool(answers.get())


def _build_trainer(
    config: Config,
    num_workers: int,
    use_gpu: bool,
    *,
    start_attempts: int,
    callbacks: list[Any] | None = None,
    ask: Ask | None = None,
    stop: Place | None = None,
) -> Any:
    path, filesystem = as_arrow(config.run_folder.parent)
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config,
            "directory": str(Path.cwd()),
            "ask": ask,
            "stop": (stop or config.run_folder).absolute(),
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
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=start_attempts),
            logging_config=LoggingConfig(log_level="INFO" if is_verbose() else "ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    config: Config = job["config"]
    os.chdir(job["directory"])
    run = open_run(config, get_device())
    steps, timeout = config.outer.num_steps, config.cluster.timeout
    session = RaySession(job["stop"], run.data, steps, timeout, job["ask"])
    gauges, workers = Gauges(TRAINING, config.name), {"workers": session.world_size}

    def show(row: Mapping[str, Any]) -> None:
        gauges({**workers, **row})

    leaving: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if job["ask"] is None:
        (run.folder / STARTED).touch()
        leaving = in_background(partial(_stop_when_drained, run.folder))
    with leaving, contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None, show=show)


def _forget_ray_snapshot(folder: Place) -> None:
    """Remove Ray Train's own memory of earlier checkpoints; ours are found by their folders."""
    # Ray writes it in place: a kill can tear it, and then no later run starts. It also names
    # checkpoints that are dropped since.
    remove(folder / RAY_SNAPSHOT)


def _stop_at_sigterm(folder: Place) -> None:
    """At SIGTERM this worker asks for a stop; a second one ends it as usual."""
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
