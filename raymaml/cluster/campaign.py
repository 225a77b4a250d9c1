"""Ray Tune: the chunks of a campaign as trials."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from raymaml.cluster.runtime import cluster_resources, connected, plan_workers
from raymaml.config.schema import Config
from raymaml.evaluation.campaign import Campaign, Chunk, Echo, Progress, plan_campaign
from raymaml.types import UserError


def judge_on_cluster(config: Config, echo: Echo) -> Path:
    """Judge all that is missing, a chunk a Tune trial, and write the report.

    A chunk's record file is all that is remembered: Tune's own state is thrown away, and a
    campaign goes on after any kill with the chunks that have no complete file.

    Raises:
        UserError: the run cannot be judged, or some chunks failed.
    """
    campaign = plan_campaign(config, torch.device("cpu"))
    chunks = campaign.missing()
    if chunks:
        with connected():
            _, use_gpu = plan_workers(
                config.cluster.model_copy(update={"num_workers": "auto"}), cluster_resources()
            )
            _run_trials(campaign, chunks, use_gpu, echo)
    return campaign.report()


def _run_trials(campaign: Campaign, chunks: list[Chunk], use_gpu: bool, echo: Echo) -> None:
    from ray import tune

    storage = campaign.folder.absolute() / f".tune-{os.getpid()}"
    trial = tune.with_parameters(_judge_chunk, config=campaign.config, directory=str(Path.cwd()))
    resources: dict[str, float] = {"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1}
    progress = _progress_callback(Progress(chunks, echo))
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"chunk": tune.grid_search([dict(vars(chunk)) for chunk in chunks])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            verbose=0,
            callbacks=[progress],
            failure_config=tune.FailureConfig(max_failures=campaign.config.cluster.max_failures),
        ),
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if results.errors:
        lines = [line for line in str(results.errors[0]).splitlines() if line.strip()]
        raise UserError(
            f"{campaign.folder}: {len(results.errors)} chunks failed more often than"
            f" cluster.max_failures allows, the first with: {lines[-1].strip()}; finished chunks"
            " are kept: run the same command to go on"
        )


def _judge_chunk(trial: dict[str, Any], config: Config, directory: str) -> None:
    """Judge one chunk; the process, with its opened data, serves many trials."""
    from ray import tune

    os.chdir(directory)
    accuracies = _campaign(config.model_dump_json()).judge(Chunk(**trial["chunk"]))
    tune.report({"accuracies": accuracies})


@functools.lru_cache(maxsize=1)
def _campaign(config_json: str) -> Campaign:
    config = Config.model_validate_json(config_json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.cluster.threads_per_worker)
    return plan_campaign(config, device)


def _progress_callback(progress: Progress) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            progress.add(Chunk(**trial.config["chunk"]), trial.last_result["accuracies"])

    return Callback()
