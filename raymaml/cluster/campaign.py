"""Ray Tune: the chunks of a campaign as trials."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from raymaml.cluster.runtime import (
    call_in_thread,
    cluster_resources,
    connected,
    plan_workers,
)
from raymaml.config.schema import Config
from raymaml.errors import UserError
from raymaml.evaluation.campaign import Campaign, Chunk, Echo, Progress, plan_campaign
from raymaml.training.process import prepare_process
from raymaml.training.run_folder import request_stop, stop_requested
from raymaml.training.worker import on_interrupt


def judge_on_cluster(config: Config, echo: Echo) -> Path:
    """Judge all that is missing, a chunk a Tune trial, and write the report.

    A chunk's record file is all that is remembered: Tune's own state is thrown away, and a
    campaign goes on after any kill with the chunks that have no complete file.

    Raises:
        UserError: the run cannot be judged, another process judges it, or some chunks failed.
        KeyboardInterrupt: Ctrl-C; the chunks that were done are kept.
    """
    campaign = plan_campaign(config, torch.device("cpu"))
    chunks = campaign.missing()
    if chunks:
        with _scratch(campaign.folder) as scratch, connected(config.cluster):
            _, use_gpu = plan_workers(
                config.cluster.model_copy(update={"num_workers": "auto"}), cluster_resources()
            )
            with on_interrupt(lambda: request_stop(scratch)):
                _run_trials(campaign, chunks, use_gpu, scratch, echo)
    return campaign.report()


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Hold the right to judge, with an empty folder for Tune's own state."""
    scratch = folder.absolute() / ".tune"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            shutil.rmtree(scratch, ignore_errors=True)  # of a campaign that was killed
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Timeout:
        raise UserError(
            f"{folder}: another process is judging this run; wait for it, or stop it"
        ) from None


def _run_trials(
    campaign: Campaign, chunks: list[Chunk], use_gpu: bool, scratch: Path, echo: Echo
) -> None:
    from ray import tune

    trial = tune.with_parameters(
        _judge_chunk, config=campaign.config, directory=str(Path.cwd()), use_gpu=use_gpu
    )
    resources: dict[str, float] = {"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1}
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"chunk": tune.grid_search([dict(vars(chunk)) for chunk in chunks])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[_progress_callback(Progress(chunks, echo))],
            stop=_stopper(scratch),
            failure_config=tune.FailureConfig(max_failures=campaign.config.cluster.max_failures),
        ),
    )
    results = call_in_thread(tuner.fit)
    if stop_requested(scratch):
        raise KeyboardInterrupt
    if results.errors:
        lines = [line for line in str(results.errors[0]).splitlines() if line.strip()]
        raise UserError(
            f"{campaign.folder}: {len(results.errors)} chunks failed more often than"
            f" cluster.max_failures allows, the first with: {lines[-1].strip()}; finished chunks"
            " are kept: run the same command to go on"
        )


def _judge_chunk(trial: dict[str, Any], config: Config, directory: str, use_gpu: bool) -> None:
    """Judge one chunk; the process, with its opened data, serves many trials."""
    from ray import tune

    os.chdir(directory)
    accuracies = _campaign(config.model_dump_json(), use_gpu).judge(Chunk(**trial["chunk"]))
    tune.report({"accuracies": accuracies})


@functools.lru_cache(maxsize=1)
def _campaign(config_json: str, use_gpu: bool) -> Campaign:
    config = Config.model_validate_json(config_json)
    device = torch.device("cuda" if use_gpu else "cpu")
    prepare_process(config.cluster, device)
    return plan_campaign(config, device)


def _progress_callback(progress: Progress) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            progress.add(Chunk(**trial.config["chunk"]), trial.last_result["accuracies"])

    return Callback()


def _stopper(scratch: Path) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop_requested(scratch)

    return Stopper()
