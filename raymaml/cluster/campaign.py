"""Ray Tune: the chunks of a campaign as trials."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from ray import tune

from raymaml.cluster.gauges import CAMPAIGN, Gauges
from raymaml.cluster.runtime import connected
from raymaml.cluster.tuning import run_trials, scratch_folder
from raymaml.cluster.workers import slots_of_cluster
from raymaml.common.errors import UserError, last_line
from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.campaign import Campaign, Chunk, Echo, Plan
from raymaml.evaluation.progress import Progress
from raymaml.training.settings import prepare_process


def judge_on_cluster(plan: Plan, cluster: ClusterConfig, echo: Echo) -> Campaign:
    """Judge all that is missing, a chunk per Tune trial, and return the finished campaign.

    Record files are the only memory. After any kill a campaign judges the chunks that have no
    complete file.

    Raises:
        UserError: the run cannot be judged, another process judges it, or some chunks failed.
        KeyboardInterrupt, Terminated: Ctrl-C, SIGTERM; the chunks that were done are kept.
    """
    campaign = plan(torch.device("cpu"))
    if campaign.missing():
        with campaign.sole_judge() as require_held:
            if campaign.missing():  # another process may have judged them meanwhile
                _judge(campaign, plan, cluster, echo, require_held)
    return campaign.require_finished()


def _judge(
    campaign: Campaign,
    plan: Plan,
    cluster: ClusterConfig,
    echo: Echo,
    require_held: Callable[[], None],
) -> None:
    with scratch_folder(campaign.folder) as scratch, connected(cluster):
        slots, use_gpu = slots_of_cluster(cluster)
        if cluster.num_workers != "auto":
            slots = min(slots, cluster.num_workers)
        device = torch.device("cuda" if use_gpu else "cpu")
        for line in campaign.announcement(slots, device):
            echo(line)
        here = {"plan": plan, "key": uuid4().hex, "cluster": cluster, "device": device}
        problems: list[str] = []
        gauges = Gauges(CAMPAIGN, campaign.name, tags=("arm",))
        with campaign.progress(echo, gauges) as progress:
            results = run_trials(
                _judge_chunk,
                {**here, "directory": Path.cwd()},
                {"CPU": 1, "GPU": int(use_gpu)},
                cluster,
                scratch=scratch,
                folder=campaign.folder,
                kept="every finished chunk",
                problems=problems,
                param_space={
                    "chunk": tune.grid_search([dict(vars(each)) for each in campaign.missing()])
                },
                callbacks=[_CountTrials(progress, require_held, problems)],
                max_concurrent_trials=slots,
            )
        if errors := results.errors:  # reads files in the scratch folder
            raise UserError(
                f"{campaign.folder}: {len(errors)} chunks failed more often than"
                f" cluster.max_failures allows, the first with: {last_line(errors[0])}",
                remedy="finished chunks are kept: run the same command to go on",
            )


def _judge_chunk(
    trial: dict[str, Any],
    *,
    plan: Plan,
    key: str,
    cluster: ClusterConfig,
    device: torch.device,
    directory: Path,
) -> None:
    """Judge one chunk; the process, with its opened data, serves many trials."""
    os.chdir(directory)
    try:
        if key not in _planned:
            prepare_process(cluster, device)
            _planned.clear()
            _planned[key] = plan(device)
        accuracies = _planned[key].judge(Chunk(**trial["chunk"]))
    except UserError as error:  # raised, Tune would try it ``max_failures`` times
        tune.report({"problems": list(error.problems), "accuracies": []})
    else:
        tune.report({"problems": [], "accuracies": accuracies})


_planned: dict[str, Campaign] = {}
"""The campaign that this process serves, by a name that no other has."""


class _CountTrials(tune.Callback):
    """Counts each finished trial, as long as this process may judge."""

    def __init__(
        self, progress: Progress, require_held: Callable[[], None], problems: list[str]
    ) -> None:
        self._progress, self._require_held, self._problems = progress, require_held, problems

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count the trial."""
        try:
            self._require_held()
        except UserError as error:
            self._problems.extend(error.problems)
            return
        chunk = Chunk(**trial.config["chunk"])
        if not trial.last_result["problems"]:
            self._progress.add(chunk.arm, chunk.count, trial.last_result["accuracies"])

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its callbacks to continue after a kill. A campaign continues from its records
        # instead, and the live table must stay in this process.
        return tune.Callback, ()
