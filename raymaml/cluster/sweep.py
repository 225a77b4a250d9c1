"""Ray Tune runs the trials of a sweep; the journal remembers and decides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raymaml.cluster.runtime import connected
from raymaml.cluster.train import train_trial
from raymaml.cluster.tuning import run_trials, scratch_folder
from raymaml.cluster.workers import slots_of_cluster
from raymaml.common.errors import StorageError, UserError, last_line
from raymaml.experiments.journal import Journal
from raymaml.experiments.sweep import Sweep, Trial, train_alone
from raymaml.storage.place import Place
from raymaml.training.run import stop_requested, watch_stop, withdraw_stop
from raymaml.training.state import Validation

_PATIENCE = "600"
"""Seconds that a process waits for a trial that was stopped to end its workers, before it runs the
next one. Where it gives up, Tune 2.60 drops that one without a word and waits for it for ever."""


def run_on_tune(sweep: Sweep, trials: Iterator[Trial], journal: Journal) -> None:
    """Join or start a cluster, and run the trials there, as many at once as there is room for.

    Raises:
        UserError: the cluster has no room for a single trial, or fails.
        KeyboardInterrupt, Terminated: Ctrl-C, SIGTERM; all finished work is kept.
    """
    folder, workers = sweep.folder, sweep.settings.workers_per_trial
    problems: list[str] = []
    with scratch_folder(folder) as scratch, connected(sweep.base.cluster):
        at_once, use_gpu = _room(sweep)
        withdraw_stop(folder)
        run_trials(
            _run_trial,
            {"workers": workers, "use_gpu": use_gpu, "stop": folder, "directory": Path.cwd()},
            # Ray Train's workers reserve their own.
            {"CPU": 0.001} if workers > 1 else {"CPU": 1, "GPU": int(use_gpu)},
            sweep.base.cluster,
            scratch=scratch,
            folder=folder,
            kept="what the trials have saved",
            problems=problems,
            stop=folder,
            num_samples=sweep.settings.count,
            max_concurrent_trials=at_once,
            search_alg=NextTrial(trials, folder),
            scheduler=AskJournal(journal, problems),
        )


def _room(sweep: Sweep) -> tuple[int, bool]:
    """Return the number of trials at once, and whether they use GPUs."""
    # Tune and Train do not share out resources between them, and would wait for ever.
    workers, limit = sweep.settings.workers_per_trial, sweep.settings.max_concurrent_trials
    slots, use_gpu = slots_of_cluster(sweep.base.cluster)
    if slots < workers:
        raise UserError(
            f"workers_per_trial is {workers} but the Ray cluster has room for {slots}",
            remedy=f"use at most {slots}",
        )
    at_once = slots // workers
    return (at_once if limit == "auto" else min(at_once, limit)), use_gpu


def _run_trial(
    config: Mapping[str, Any], *, workers: int, use_gpu: bool, stop: Place, directory: Path
) -> None:
    """Run one trial; the process serves many trials.

    A fault of the trial is reported, not raised: Tune would try the trial again. A refusal of the
    storage is not a fault of the trial, and ends the sweep.
    """
    os.chdir(directory)
    # here and not in the driver, whose cluster may have been there before it
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _PATIENCE)
    run, stops = config["trial"].config, watch_stop(stop)
    try:
        if stops():
            return
        if workers == 1:
            train_alone(run, torch.device("cuda" if use_gpu else "cpu"), _report, stops)
        else:
            train_trial(run, workers, use_gpu, _report, stop)
    except StorageError as error:
        tune.report({"problems": list(error.problems)})
    except UserError as error:
        tune.report({"failed": "; ".join(error.problems)})


def _report(validation: Validation) -> bool:
    """Report to Tune, which ends the thread where the trial does not go on."""
    tune.report(asdict(validation))
    return True


class AskJournal(FIFOScheduler):
    """Has the journal decide on each result; a journal that cannot be written is a problem."""

    def __init__(self, journal: Journal, problems: list[str]) -> None:
        super().__init__()
        self._journal, self._problems = journal, problems

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Write the result into the journal, and return its decision."""
        number, goes_on = trial.config["trial"].number, "failed" not in result
        if not goes_on:
            self._journal.fail(number, result["failed"])
        elif "step" in result:  # Tune flattens a result, and reports one of its own at the end
            validation = Validation(**{each.name: result[each.name] for each in fields(Validation)})
            try:
                goes_on = self._journal.report(number, validation)
            except UserError as error:
                self._problems.extend(error.problems)
                goes_on = False
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Write down that a trial has failed, unless Tune tries it again."""
        if not trial.should_recover():
            error = trial.get_error()
            said = last_line(error) if error is not None else "its process was lost"
            self._journal.fail(trial.config["trial"].number, f"failed too often, last with: {said}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its scheduler, to go on after a kill. The journal serves for that here.
        return FIFOScheduler, ()


class NextTrial(Searcher):
    """Gives Tune the next trial of the sweep whenever there is room, until a stop is asked for."""

    def __init__(self, trials: Iterator[Trial], stop: Place) -> None:
        super().__init__()
        self._trials, self._stop = trials, stop

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the config of Tune's trial."""
        trial = None if stop_requested(self._stop) else next(self._trials, None)
        return Searcher.FINISHED if trial is None else {"trial": trial}

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """Do nothing: the journal knows."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: the journal is the state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Searcher, ()
