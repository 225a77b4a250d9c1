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

from raymaml.cluster.room import find_room, growing
from raymaml.cluster.runtime import (
    call_in_thread,
    cluster_resources,
    connected,
    plan_crew,
    worker_resources,
)
from raymaml.config.schema import Config
from raymaml.data.files import write_text
from raymaml.errors import UserError
from raymaml.signals import on_interrupt, stopped
from raymaml.training.crew import Crew, Patience
from raymaml.training.data import open_training_data
from raymaml.training.metrics import METRICS_FILE, progress_line
from raymaml.training.run_folder import (
    claim,
    is_done,
    request_stop,
    saved_step,
    withdraw_stop,
)
from raymaml.training.settings import settings_line
from raymaml.training.worker import Echo, adaptation_table, conclude

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_FAILURE = ".failure"
"""What a worker found that the user did wrong, for the driver."""
_STARTED = ".started"
"""Is there once the workers of a crew are running."""


def train_on_cluster(config: Config, echo: Echo) -> bool:
    """Train with Ray Train's workers, from the last checkpoint on.

    Ctrl-C and SIGTERM stop at the next step boundary.

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
    crew = plan_crew(config, cluster_resources())
    (folder / _FAILURE).unlink(missing_ok=True)
    asked = threading.Event()

    def stop() -> None:
        asked.set()
        request_stop(folder)

    def announce(workers: int, before: int) -> None:
        if before == 0:
            device = torch.device("cuda" if crew.use_gpu else "cpu")
            echo(settings_line(config, image_shape, device, workers))
            echo(table)
        elif workers != before:
            step = max(0, saved_step(folder))
            echo(f"{folder}: {workers} worker(s) from outer step {step} on, {before} before")

    with (
        _follow(folder, config.outer.num_steps, echo),
        on_interrupt(stop, config.cluster.grace_seconds),
    ):
        workers, patience = 0, Patience(config.cluster.max_failures)
        while not is_done(folder, config):
            before, workers = workers, find_room(crew, config.cluster, asked, echo)
            withdraw_stop(folder)
            if asked.is_set():  # also if it came just before the stop was withdrawn
                break
            announce(workers, before)
            failure = _run_crew(config, folder, crew, workers)
            if failure and not asked.is_set() and patience.ends(saved_step(folder)):
                raise _gives_up(folder, failure)
    if saved_step(folder) < 0:
        raise stopped()


def _run_crew(config: Config, folder: Path, crew: Crew, workers: int) -> Exception | None:
    """Let so many workers train until they end; return what made them fail, if anything did.

    They end when all is done, when there is room for more of them, when one is told to go and when
    one is lost; in all cases but the last they have saved where they stand.

    Raises:
        UserError: a mistake of the user's that one of them met.
    """
    _forget_ray_snapshot(folder)
    started = folder / _STARTED
    started.unlink(missing_ok=True)
    trainer = _build_trainer(config, folder, workers, crew.use_gpu)
    failure: Exception | None = None
    with growing(crew, workers, started.exists, lambda: request_stop(folder)):
        try:
            call_in_thread(trainer.fit)
        except Exception as error:
            failure = error
    if (folder / _FAILURE).exists():
        raise UserError(*json.loads((folder / _FAILURE).read_text(encoding="utf-8")))
    return failure


def _build_trainer(config: Config, folder: Path, num_workers: int, use_gpu: bool) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raymaml.cluster.leaving import StopOnTerminate

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
            # What failed is tried again by us, with the workers for which there is room then.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            callbacks=[StopOnTerminate(folder.absolute())],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    """Run one worker of Ray Train."""
    from raymaml.cluster.leaving import stop_on_drain
    from raymaml.cluster.session import RaySession, device_and_world_size
    from raymaml.training.worker import train_worker

    config: Config = job["config"]
    folder: Path = job["folder"]
    os.chdir(job["directory"])
    if (folder / _FAILURE).exists():
        return  # the workers before these met a mistake of the user's: nothing to try again
    device, world_size = device_and_world_size()
    (folder / _STARTED).touch()
    try:
        data = open_training_data(config, device)
        session = RaySession(folder, data, config.outer.num_steps)
        with stop_on_drain(folder):
            train_worker(config, folder, data, session, lambda _line: None)
    except UserError as error:
        write_text(folder / _FAILURE, json.dumps(error.problems))
        if world_size > 1:
            # The others may not have met it and would wait for this one: let Ray end them.
            raise


def _gives_up(folder: Path, failure: Exception) -> UserError:
    return UserError(
        f"{folder}: the workers failed more often in a row than cluster.max_failures allows, last"
        f" with: {_last_line(failure)}; everything up to the last checkpoint is kept: run the same"
        " command to go on"
    )


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
