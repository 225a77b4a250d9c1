"""Ray Train: the driver of a training run."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raymaml.cluster.runtime import (
    call_in_thread,
    cluster_resources,
    connected,
    plan_workers,
    worker_resources,
)
from raymaml.config.schema import Config
from raymaml.data.files import as_arrow, make_folder, read_text
from raymaml.logs import is_verbose
from raymaml.places import Place, is_remote
from raymaml.training.data import open_training_data, verify_images
from raymaml.training.metrics import METRICS_FILE, progress_line
from raymaml.training.run_folder import STOP, claim, is_done, request_stop
from raymaml.training.session import Session
from raymaml.training.settings import settings_line
from raymaml.training.supervised import (
    ANSWER,
    QUESTION,
    Ask,
    EndedEarly,
    SupervisedSession,
    answer_by_file,
    ask_by_file,
)
from raymaml.training.worker import Echo, adaptation_table, conclude, on_interrupt

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_ANSWER_EVERY = 0.1  # seconds
_START_ATTEMPTS = 10
"""Minutes to wait for the workers' CPUs or GPUs to be free; Ray's default is for ever."""


def train_on_cluster(config: Config, echo: Echo) -> bool:
    """Train with Ray Train's workers, from the last checkpoint on; Ctrl-C stops cleanly.

    Returns:
        Whether all outer steps are done.

    Raises:
        UserError: data, run folder or cluster do not fit the config, or a worker found such.
    """
    data = open_training_data(config, torch.device("cpu"))
    table = adaptation_table(config, data)
    with claim(config, data) as folder:
        if not is_done(folder, config):
            verify_images(data)
            with connected(config.cluster):
                _train(config, folder, data.image_shape, table, echo)
        return conclude(config, folder, echo)


def _train(
    config: Config, folder: Place, image_shape: tuple[int, int, int], table: str, echo: Echo
) -> None:
    num_workers, use_gpu = plan_workers(config.cluster, cluster_resources())
    _forget_ray_snapshot(folder)
    device = torch.device("cuda" if use_gpu else "cpu")
    echo(settings_line(config, image_shape, device, num_workers))
    echo(table)
    trainer = _build_trainer(config, folder, num_workers, use_gpu)
    with _follow(folder, config.outer.num_steps, echo), on_interrupt(lambda: request_stop(folder)):
        _fit(trainer, folder)


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
        (folder / name).unlink(missing_ok=True)
    trainer = _build_trainer(config, folder, num_workers, use_gpu, supervised=True)
    with ThreadPoolExecutor(1) as executor:
        fit = executor.submit(_fit, trainer, folder)
        answered: str | None = None
        while not fit.done():
            if stop():
                request_stop(folder)
            answered = answer_by_file(folder, ask, answered)
            wait([fit], timeout=_ANSWER_EVERY)
        fit.result()


def _build_trainer(
    config: Config, folder: Place, num_workers: int, use_gpu: bool, *, supervised: bool = False
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raymaml.cluster.faults import StopAtUserErrors

    path, filesystem = as_arrow(folder.parent)
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config,
            "folder": folder,
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
            callbacks=[StopAtUserErrors()],
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures,
                controller_failure_limit=_START_ATTEMPTS,
            ),
            logging_config=LoggingConfig(log_level="INFO" if is_verbose() else "ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    from raymaml.cluster.gauges import TrainingGauges
    from raymaml.cluster.session import RaySession, torch_device
    from raymaml.training.worker import train_worker

    config: Config = job["config"]
    folder: Place = job["folder"]
    os.chdir(job["directory"])
    data = open_training_data(config, torch_device())
    session: Session = RaySession(folder, data, config)
    if job["supervised"]:
        ask = partial(ask_by_file, folder)
        session = SupervisedSession(session, ask, session.stop_requested)
    gauges = TrainingGauges(config.name, session.world_size)
    with contextlib.suppress(EndedEarly):
        train_worker(config, folder, data, session, lambda _line: None, show=gauges)


def _fit(trainer: Any, folder: Place) -> None:
    """Let Ray Train run the workers; what ends the run is told as one message."""
    try:
        call_in_thread(trainer.fit)
    except Exception as error:
        from raymaml.cluster.faults import told_failure

        raise told_failure(error, folder) from error


def _forget_ray_snapshot(folder: Place) -> None:
    """Let Ray Train start without its own memory of earlier checkpoints.

    Ray writes that file in place: a kill can tear it, and then no later run starts; and it names
    checkpoints that we have dropped since. Ours are found by their folders.
    """
    (folder / RAY_SNAPSHOT).unlink(missing_ok=True)


@contextlib.contextmanager
def _follow(folder: Place, num_steps: int, echo: Echo) -> Iterator[None]:
    """Echo a progress line for each metrics row that rank 0 writes during the block."""
    path = folder / METRICS_FILE
    seen: set[str] = set(read_text(path).splitlines()) if path.exists() else set()
    done = threading.Event()
    pause = 3.0 if is_remote(folder) else 0.5

    def poll() -> None:
        last = False
        while not last:
            last = done.wait(pause)
            if path.exists():
                for line in read_text(path).splitlines():
                    if line not in seen and line.endswith("}"):
                        seen.add(line)
                        echo(progress_line(json.loads(line), num_steps))

    thread = threading.Thread(target=poll, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
