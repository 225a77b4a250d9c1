"""Ray Tune: the trials of a sweep."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raymaml.cluster.campaign import StopAtProblems, scratch_folder
from raymaml.cluster.runtime import call_in_thread, connected
from raymaml.cluster.trainer import train_supervised
from raymaml.cluster.workers import slots_of_cluster
from raymaml.common.errors import StorageError, UserError, last_line
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.sweep import Asha
from raymaml.evaluation.legs import run_alone, up_to
from raymaml.evaluation.referee import Decide, Referee, always
from raymaml.evaluation.sweep import Leg, RunLegs, Sweep, first_rung, max_steps
from raymaml.storage.place import Place
from raymaml.training.run_folder import request_stop, stop_requested, watch_stop, withdraw_stop
from raymaml.training.state import Validation
from raymaml.training.supervised import Ask

_PATIENCE = "600"
"""Seconds that a process waits for a trial that was stopped to end its workers, before it runs the
next one. Where it gives up, Tune 2.60 drops that one without a word and waits for it for ever."""

_VALIDATION = fields(Validation)


def scheduler_of(sweep: Sweep) -> Decide:
    """Return the decisions of the sweep's scheduler, asked at each validation."""
    scheduler = sweep.settings.scheduler
    if not isinstance(scheduler, Asha):
        return always
    from raymaml.cluster.asha import asha_decisions

    return asha_decisions(
        first_rung=first_rung(sweep, scheduler),
        reduction_factor=scheduler.reduction_factor,
        max_steps=max_steps(sweep),
    )


@contextlib.contextmanager
def tune_runner(sweep: Sweep) -> Iterator[RunLegs]:
    """Join or start a cluster for the block, and run trials there.

    Tune's own state is thrown away: the referee and the run folders are all that is remembered.

    Raises:
        UserError: the cluster has no room for a single trial.
    """
    workers = sweep.settings.workers_per_trial
    with connected(sweep.base.cluster), scratch_folder(sweep.folder) as scratch:
        slots, use_gpu = slots_of_cluster(sweep.base.cluster)
        if slots < workers:
            raise UserError(
                f"workers_per_trial is {workers} but the Ray cluster has room for {slots}; use at"
                " most so many"
            )
        at_once = slots // workers
        if sweep.settings.max_concurrent_trials != "auto":
            at_once = min(at_once, sweep.settings.max_concurrent_trials)
        withdraw_stop(sweep.folder)
        room = _Room(
            workers=workers,
            at_once=at_once,
            use_gpu=use_gpu,
            folder=sweep.folder,
            scratch=scratch,
        )
        yield partial(_run_legs, room)


@dataclass(frozen=True, kw_only=True)
class _Room:
    """Where the trials run."""

    workers: int
    """Of each trial."""
    at_once: int
    """Trials: Tune and Train do not share out resources between them, and would wait for ever."""
    use_gpu: bool
    folder: Place
    """Of the sweep, which all nodes see: there a stop is asked for."""
    scratch: Path
    """For Tune's own state."""

    def resources(self) -> dict[str, float]:
        """Return what Tune reserves for a trial; Ray Train's workers reserve their own."""
        if self.workers > 1:
            return {"CPU": 0.001}
        return {"GPU": 1, "CPU": 1} if self.use_gpu else {"CPU": 1}


def _run_legs(room: _Room, legs: Sequence[Leg], referee: Referee) -> None:
    from ray import tune

    trial = tune.with_parameters(
        _run_trial, legs={leg.trial: leg for leg in legs}, room=room, directory=str(Path.cwd())
    )
    failures = {leg.config.cluster.max_failures for leg in legs}
    problems: list[str] = []
    tuner = tune.Tuner(
        tune.with_resources(trial, room.resources()),
        param_space={"trial": tune.grid_search([leg.trial for leg in legs])},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=room.at_once,
            scheduler=_tune_scheduler(referee, problems),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(room.scratch),
            verbose=0,
            callbacks=[_failure_callback(referee, problems)],
            stop=StopAtProblems(problems),
            failure_config=tune.FailureConfig(max_failures=max(failures)),
        ),
    )
    grace = max(leg.config.cluster.grace_seconds for leg in legs)
    with on_interrupt(lambda: request_stop(room.folder), grace):
        try:
            call_in_thread(tuner.fit)
        except Exception as error:
            from raymaml.cluster.explain import cluster_failed, user_error

            if found := user_error(error):
                raise found from error
            if stop_requested(room.folder):  # the signal may have ended the cluster as well
                raise stopped() from error
            kept = "what the trials have saved"
            raise cluster_failed(error, legs[0].config.run_dir, kept) from error
    if problems:
        raise UserError(*problems)
    if stop_requested(room.folder):
        raise stopped()


def _run_trial(
    trial: Mapping[str, Any], *, legs: Mapping[int, Leg], room: _Room, directory: str
) -> None:
    """Run one leg; the process serves many trials.

    What the trial met is reported, not raised: Tune would try it again. What the storage refuses is
    no failing of the trial's, and ends the sweep.
    """
    from ray import tune

    os.chdir(directory)
    # here and not in the driver, whose cluster may have been there before it
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _PATIENCE)
    leg, stop = legs[trial["trial"]], watch_stop(room.folder)
    try:
        if stop():
            return
        if room.workers == 1:
            device = torch.device("cuda" if room.use_gpu else "cpu")
            run_alone(leg, device, _asking_tune(leg), stop)
        else:
            ask = up_to(leg, _asking_tune(leg))
            train_supervised(leg.config, room.workers, room.use_gpu, ask, stop)
    except StorageError as error:
        tune.report({"problems": list(error.problems)})
    except UserError as error:
        tune.report({"problem": "; ".join(error.problems)})


def _asking_tune(leg: Leg) -> Ask:
    """Return what reports a validation to Tune, which ends the thread where the answer is no."""
    from ray import tune

    def ask(validation: Validation) -> bool:
        tune.report({"run": leg.config.name, **asdict(validation)})
        return True

    return ask


def _tune_scheduler(referee: Referee, problems: list[str]) -> Any:
    """Return a scheduler that starts trials in their order, and asks the referee.

    What keeps the referee from writing is added to ``problems``.
    """
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Scheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            try:
                goes_on = self._hear(trial.config["trial"], result)
            except UserError as error:
                problems.extend(error.problems)
                goes_on = False
            return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

        def _hear(self, number: int, result: dict[str, Any]) -> bool:
            if "problem" in result:
                referee.fail(number, result["problem"])
                return False
            if "step" not in result:  # stopped before it began
                return True
            validation = Validation(**{field.name: result[field.name] for field in _VALIDATION})
            return referee.report(number, result["run"], validation)

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune pickles its scheduler, to go on after a kill. The referee serves for that here.
            return FIFOScheduler, ()

    return Scheduler()


def _failure_callback(referee: Referee, problems: list[str]) -> Any:
    """Return what tells the referee of trials that Tune has given up.

    Its scheduler would be told of each failure, also of those after which a trial is tried again.
    What keeps the referee from writing is added to ``problems``.
    """
    from ray import tune

    class Callback(tune.Callback):
        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            error = trial.get_error()
            said = last_line(error) if error is not None else "its process was lost"
            try:
                referee.fail(trial.config["trial"], f"failed too often, last with: {said}")
            except UserError as problem:
                problems.extend(problem.problems)

        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()  # as the scheduler

    return Callback()
