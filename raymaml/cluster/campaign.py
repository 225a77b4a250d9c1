"""Ray Tune: the chunks of a campaign as trials."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from raymaml.cluster.runtime import (
    call_in_thread,
    cluster_resources,
    connected,
    plan_workers,
)
from raymaml.config.schema import ClusterConfig
from raymaml.errors import UserError
from raymaml.evaluation.campaign import Campaign, Chunk, Echo, Plan, episodes_by_arm
from raymaml.evaluation.progress import Progress
from raymaml.signals import on_interrupt, stopped
from raymaml.training.process import prepare_process
from raymaml.training.run_folder import request_stop, stop_requested


def judge_on_cluster(plan: Plan, cluster: ClusterConfig, echo: Echo) -> Path:
    """Judge all that is missing, a chunk a Tune trial, and write the report.

    A chunk's record file is all that is remembered: Tune's own state is thrown away, and a
    campaign goes on after any kill with the chunks that have no complete file.

    Raises:
        UserError: the run cannot be judged, another process judges it, or some chunks failed.
        KeyboardInterrupt, Terminated: Ctrl-C, SIGTERM; the chunks that were done are kept.
    """
    campaign = plan(torch.device("cpu"))
    if chunks := campaign.missing():
        with _scratch(campaign.folder) as scratch, connected(cluster):
            slots, use_gpu = plan_workers(
                cluster.model_copy(update={"num_workers": "auto"}), cluster_resources()
            )
            if cluster.num_workers != "auto":
                slots = min(slots, cluster.num_workers)
            trials = _Trials(chunks=chunks, slots=slots, use_gpu=use_gpu, scratch=scratch)
            with (
                on_interrupt(lambda: request_stop(scratch), cluster.grace_seconds),
                Progress(episodes_by_arm(chunks), echo) as progress,
            ):
                _run_trials(campaign, trials, plan, cluster, progress)
    return campaign.report()


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """What Tune is to run, and where."""

    chunks: list[Chunk]
    slots: int
    """Trials at once, at most."""
    use_gpu: bool
    scratch: Path


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
    campaign: Campaign, trials: _Trials, plan: Plan, cluster: ClusterConfig, progress: Progress
) -> None:
    from ray import tune

    trial = tune.with_parameters(
        _judge_chunk,
        plan=plan,
        key=uuid4().hex,
        cluster=cluster,
        directory=str(Path.cwd()),
        use_gpu=trials.use_gpu,
    )
    resources: dict[str, float] = {"GPU": 1, "CPU": 1} if trials.use_gpu else {"CPU": 1}
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"chunk": tune.grid_search([dict(vars(chunk)) for chunk in trials.chunks])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=trials.slots),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(trials.scratch),
            verbose=0,
            callbacks=[_progress_callback(progress)],
            stop=_stopper(trials.scratch),
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    results = call_in_thread(tuner.fit)
    if stop_requested(trials.scratch):
        raise stopped()
    if results.errors:
        lines = [line for line in str(results.errors[0]).splitlines() if line.strip()]
        raise UserError(
            f"{campaign.folder}: {len(results.errors)} chunks failed more often than"
            f" cluster.max_failures allows, the first with: {lines[-1].strip()}; finished chunks"
            " are kept: run the same command to go on"
        )


def _judge_chunk(
    trial: dict[str, Any],
    *,
    plan: Plan,
    key: str,
    cluster: ClusterConfig,
    directory: str,
    use_gpu: bool,
) -> None:
    """Judge one chunk; the process, with its opened data, serves many trials."""
    from ray import tune

    os.chdir(directory)
    if key not in _planned:
        device = torch.device("cuda" if use_gpu else "cpu")
        prepare_process(cluster, device)
        _planned.clear()
        _planned[key] = plan(device)
    accuracies = _planned[key].judge(Chunk(**trial["chunk"]))
    tune.report({"accuracies": accuracies})


_planned: dict[str, Campaign] = {}
"""The campaign that this process serves, by a name that no other has."""


def _progress_callback(progress: Progress) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            chunk = Chunk(**trial.config["chunk"])
            progress.add(chunk.arm, chunk.count, trial.last_result["accuracies"])

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune pickles its callbacks, to go on after a kill. Records serve for that here, and
            # a live table, which belongs to this process and its terminal, has no pickle.
            return tune.Callback, ()

    return Callback()


def _stopper(scratch: Path) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop_requested(scratch)

    return Stopper()
