"""Ray Train: the driver of a training run."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
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
from raymaml.data.files import write_text
from raymaml.errors import UserError
from raymaml.signals import on_interrupt
from raymaml.training.data import open_training_data
from raymaml.training.metrics import METRICS_FILE, progress_line
from raymaml.training.run_folder import claim, is_done, request_stop
from raymaml.training.settings import settings_line
from raymaml.training.worker import Echo, adaptation_table, conclude

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_FAILURE = ".failure"
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
            with connected(config.cluster):
                _train(config, folder, data.image_shape, table, echo)
        return conclude(config, folder, echo)


def _train(
    config: Config, folder: Path, image_shape: tuple[int, int, int], table: str, echo: Echo
) -> None:
    num_workers, use_gpu = plan_workers(config.cluster, cluster_resources())
    _forget_ray_snapshot(folder)
    (folder / _FAILURE).unlink(missing_ok=True)
    device = torch.device("cuda" if use_gpu else "cpu")
    echo(settings_line(config, image_shape, device, num_workers))
    echo(table)
    trainer = _build_trainer(config, folder, num_workers, use_gpu)
    with (
        _follow(folder, config.outer.num_steps, echo),
        on_interrupt(lambda: request_stop(folder), config.cluster.grace_seconds),
    ):
        _fit(trainer, folder)


def _build_trainer(config: Config, folder: Path, num_workers: int, use_gpu: bool) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": config,
            "folder": folder,
            "directory": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(use_gpu),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(folder.parent.absolute()),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures,
                controller_failure_limit=_START_ATTEMPTS,
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    from raymaml.cluster.session import RaySession, device_and_world_size
    from raymaml.training.worker import train_worker

    config: Config = job["config"]
    folder: Path = job["folder"]
    os.chdir(job["directory"])
    if (folder / _FAILURE).exists():
        return  # the workers before these met a mistake of the user's: nothing to try again
    device, world_size = device_and_world_size()
    try:
        data = open_training_data(config, device)
        session = RaySession(folder, data, config.outer.num_steps)
        train_worker(config, folder, data, session, lambda _line: None)
    except UserError as error:
        write_text(folder / _FAILURE, json.dumps(error.problems))
        if world_size > 1:
            # The others may not have met it and would wait for this one: let Ray end them.
            raise


def _fit(trainer: Any, folder: Path) -> None:
    """Let Ray Train run the workers; a mistake of the user's that one of them met is told so."""
    failure: Exception | None = None
    try:
        call_in_thread(trainer.fit)
    except Exception as error:
        failure = error
    if (folder / _FAILURE).exists():
        raise UserError(*json.loads((folder / _FAILURE).read_text(encoding="utf-8")))
    if failure is not None:
        raise UserError(
            f"{folder}: the workers failed more often than cluster.max_failures allows, last with:"
            f" {_last_line(failure)}; everything up to the last checkpoint is kept: run the"
            " same command to go on"
        ) from failure


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _forget_ray_snapshot(folder: Path) -> None:
    """Let Ray Train start without its own memory of earlier checkpoints.

    Ray writes that file in place: a kill can tear it, and then no later run starts; and it names
    checkpoints that we have dropped since. Ours are found by their folders.
    """
    (folder / RAY_SNAPSHOT).unlink(missing_ok=True)


@contextlib.contextmanager
def _follow(folder: Path, num_steps: int, echo: Echo) -> Iterator[None]:
    """Echo a progress line for each metrics row that rank 0 writes during the block."""
    path = folder / METRICS_FILE
    seen: set[str] = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    done = threading.Event()

    def poll() -> None:
        last = False
        while not last:
            last = done.wait(0.5)
            if path.exists():
                for line in path.read_text(encoding="utf-8").splitlines():
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
