"""Errors that end the workers of Ray Train: which are tried again, and the user's message."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ray.train import ControllerError, UserCallback, WorkerGroupError

from raymaml.common.errors import UserError, last_line
from raymaml.storage.place import Place

_GOODBYE = ("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
"""Seconds that workers may take to leave their process group before they are ended. One that hangs
never does it, and Ray Train's default is 30."""


class StopAtUserErrors(UserCallback):
    """Ends a run at once when a worker raised a ``UserError``; it runs in the controller.

    Ray Train would start the workers again, ``cluster.max_failures`` times. After any other error
    it ends the workers, and does not wait for one that hangs.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a worker's ``UserError``, which Ray Train hands to the driver as it is."""
        os.environ.setdefault(*_GOODBYE)
        for error in worker_exceptions.values():
            if (found := user_error(error)) is not None:
                raise found


def user_error(error: BaseException) -> UserError | None:
    """Return the ``UserError`` that Ray wrapped in its own exceptions; None if there is none."""
    return next((each for each in _chain(error) if isinstance(each, UserError)), None)


def is_recoverable(error: Exception) -> bool:
    """Return whether workers were lost, or not started, so that others may do better."""
    if isinstance(error, ControllerError):
        return user_error(error.controller_failure) is None
    return isinstance(error, WorkerGroupError)


def explain_failure(error: Exception, folder: Place) -> UserError:
    """Return an error of Ray Train's as a message for the user."""
    kept = "everything up to the last checkpoint"
    if isinstance(error, ControllerError):
        if (found := user_error(error.controller_failure)) is not None:
            return found
        what = "the workers could not be started"
        remedy = "wait for the cluster's nodes, or lower cluster.num_workers, and "
    elif isinstance(error, WorkerGroupError):
        what = "the workers failed more often in a row than cluster.max_failures allows"
        remedy = ""
        if any("memory" in str(each) for each in error.worker_failures.values()):
            remedy = "lower cluster.num_workers, if a node ran out of memory, and "
    else:
        return cluster_failed(error, folder, kept)
    return UserError(
        f"{folder}: {what}, last with: {last_line(error)}",
        remedy=f"{kept} is kept: {remedy}run the same command to go on",
    )


def cluster_failed(error: Exception, folder: Place, kept: str) -> UserError:
    """Return the message for a cluster that does not answer any more."""
    return UserError(
        f"{folder}: the cluster failed, last with: {last_line(error)}",
        remedy=f"{kept} is kept: look whether its head lives, and run the same command to go on",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, those it wraps, and those it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        wrapped = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
        error = wrapped or error.__cause__
