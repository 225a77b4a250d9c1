"""Ray Tune runs trials: the chunks of a campaign, the training runs of a sweep.

Our own files remember what is done: Tune's state is thrown away.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.stopper import NoopStopper

from raymaml.cluster.explain import cluster_failed, user_error
from raymaml.cluster.runtime import call_in_thread
from raymaml.common.errors import UserError
from raymaml.common.logs import is_verbose
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.schema import ClusterConfig
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import temporary_folder
from raymaml.training.run import request_stop, stop_requested


def run_trials(
    trial: Callable[..., None],
    parameters: Mapping[str, Any],
    resources: Mapping[str, float],
    cluster: ClusterConfig,
    *,
    scratch: Path,
    folder: Place,
    kept: str,
    problems: list[str],
    stop: Place | None = None,
    param_space: Mapping[str, Any] | None = None,
    callbacks: Sequence[tune.Callback] = (),
    **options: Any,
) -> Any:
    """Run trials on the cluster that is joined, and return Tune's ``ResultGrid``.

    Args:
        trial: called with Tune's config and with ``parameters``; it may report ``problems``.
        parameters, resources: of each trial.
        cluster: how often a trial that failed is tried again.
        scratch: holds Tune's state; see ``scratch_folder``.
        folder: holds what the trials write.
        kept: what a cluster that fails leaves there, in words.
        problems: what trials and callbacks add to it ends all trials.
        stop: the folder in which trials look for a stop; None: Tune ends them at once.
        param_space, callbacks, options: of ``Tuner``, ``RunConfig`` and ``TuneConfig``.

    Raises:
        UserError: there are problems, or the cluster failed.
        KeyboardInterrupt, Terminated: Ctrl-C, SIGTERM.
    """
    place = scratch if stop is None else stop
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, **parameters), dict(resources)),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            trial_dirname_creator=lambda each: each.trial_id,
            **options,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(scratch),
            verbose=int(is_verbose()),
            callbacks=list(callbacks),
            stop=_StopAtProblems(problems, lambda: stop is None and stop_requested(scratch)),
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        with on_interrupt(lambda: request_stop(place), cluster.grace_seconds):
            results = call_in_thread(tuner.fit)
    except Exception as error:
        raise _explained(error, place, folder, kept) from error
    if problems:
        raise UserError(*problems)
    if stop_requested(place):
        raise stopped()
    return results


def _explained(error: Exception, stop: Place, folder: Place, kept: str) -> BaseException:
    if found := user_error(error):
        return found
    if stop_requested(stop):  # the signal may have ended the cluster as well
        return stopped()
    return cluster_failed(error, folder, kept)


@contextlib.contextmanager
def scratch_folder(folder: Place) -> Iterator[Path]:
    """Yield an empty folder on disk for Tune's own state, which is gone after the block.

    Leave the cluster before: Tune may write until then.
    """
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


class _StopAtProblems(tune.Stopper):
    """Ends all trials once a trial reports ``problems``, or ``stop`` returns true."""

    def __init__(self, problems: list[str], stop: Callable[[], bool]) -> None:
        self._problems, self._stop = problems, stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Keep the problems that the result reports. Return False: the trial goes on."""
        self._problems.extend(result.get("problems", []))
        return False

    def stop_all(self) -> bool:
        """Return whether all trials end."""
        return bool(self._problems) or self._stop()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in Tune's own state would fill a list of its own.
        return NoopStopper, ()
