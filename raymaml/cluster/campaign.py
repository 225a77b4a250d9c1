"""Ray Tune: the chunks of a campaign as trials."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from ray import tune
from ray.tune.stopper import NoopStopper

from raymaml.cluster.explain import cluster_failed
from raymaml.cluster.gauges import CAMPAIGN, Gauges
from raymaml.cluster.runtime import call_in_thread, connected
from raymaml.cluster.workers import slots_of_cluster
from raymaml.common.errors import UserError, last_line
from raymaml.common.logs import is_verbose
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.campaign import Campaign, Chunk, Echo, Plan
from raymaml.evaluation.progress import Progress
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import temporary_folder
from raymaml.training.process import prepare_process
from raymaml.training.run_folder import request_stop, stop_requested


def judge_on_cluster(plan: Plan, cluster: ClusterConfig, echo: Echo) -> Campaign:
    """Judge all that is missing, a chunk per Tune trial, and return the finished campaign.

    Record files are the only memory; Tune's own state is thrown away. After any kill a campaign
    judges the chunks that have no complete file.

    Raises:
        UserError: the run cannot be judged, another process judges it, or some chunks failed.
        KeyboardInterrupt, Terminated: Ctrl-C, SIGTERM; the chunks that were done are kept.
    """
    campaign = plan(torch.device("cpu"))
    if campaign.missing():
        campaign.verify_images()
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
        problems: list[str] = []
        with (
            on_interrupt(lambda: request_stop(scratch), cluster.grace_seconds),
            campaign.progress(echo, Gauges(CAMPAIGN, campaign.name, tags=("arm",))) as progress,
        ):
            tuner = tune.Tuner(
                _trial(plan, cluster, use_gpu),
                param_space={
                    "chunk": tune.grid_search([dict(vars(each)) for each in campaign.missing()])
                },
                tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=slots),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(scratch),
                    verbose=int(is_verbose()),
                    callbacks=[_CountTrials(progress, require_held, problems)],
                    stop=StopAtProblems(problems, lambda: stop_requested(scratch)),
                    failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
                ),
            )
            _run(tuner, campaign.folder, scratch, problems)


@contextlib.contextmanager
def scratch_folder(folder: Place) -> Iterator[Path]:
    """Yield an empty folder on disk for Tune's own state, which is gone after the block."""
    if is_remote(folder):
        with temporary_folder() as temporary:
            yield temporary
        return
    scratch = folder.absolute() / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trial(plan: Plan, cluster: ClusterConfig, use_gpu: bool) -> Any:
    """Return what Tune runs as a trial, with the resources that it takes."""
    trial = tune.with_parameters(
        _judge_chunk,
        plan=plan,
        key=uuid4().hex,
        cluster=cluster,
        directory=str(Path.cwd()),
        use_gpu=use_gpu,
    )
    return tune.with_resources(trial, {"CPU": 1, "GPU": int(use_gpu)})


def _run(tuner: tune.Tuner, folder: Place, scratch: Path, problems: list[str]) -> None:
    """Run all trials; problems that they report, and a cluster that fails, are ``UserError``s."""
    try:
        results = call_in_thread(tuner.fit)
    except Exception as error:
        if stop_requested(scratch):  # the signal may have ended the cluster as well
            raise stopped() from error
        raise cluster_failed(error, folder, "every finished chunk") from error
    if problems:
        raise UserError(*problems)
    if stop_requested(scratch):
        raise stopped()
    if results.errors:
        raise UserError(
            f"{folder}: {len(results.errors)} chunks failed more often than cluster.max_failures"
            f" allows, the first with: {last_line(results.errors[0])}",
            remedy="finished chunks are kept: run the same command to go on",
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
    os.chdir(directory)
    try:
        if key not in _planned:
            device = torch.device("cuda" if use_gpu else "cpu")
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
        # Tune pickles its callbacks, to continue after a kill. Records serve for that here, and
        # a live table belongs to this process.
        return tune.Callback, ()


class StopAtProblems(tune.Stopper):
    """Ends all trials once ``stop`` returns true, or a trial reports ``problems``.

    Args:
        problems: the list that reported problems are added to.
        stop: called again and again.
    """

    def __init__(self, problems: list[str], stop: Callable[[], bool] = lambda: False) -> None:
        self._problems, self._stop = problems, stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take over the problems of a result; no trial ends by itself."""
        self._problems.extend(result.get("problems", []))
        return False

    def stop_all(self) -> bool:
        """Return whether all trials end."""
        return bool(self._problems) or self._stop()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in Tune's own state would fill a list of its own.
        return NoopStopper, ()
