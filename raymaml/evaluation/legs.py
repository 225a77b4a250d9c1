"""Trials of a sweep in one process each, and one after the other without Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from raymaml.common.errors import StorageError, UserError
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.evaluation.referee import Referee
from raymaml.evaluation.sweep import Leg, RunLegs, Sweep
from raymaml.storage.files import make_folder
from raymaml.training.run import open_run
from raymaml.training.session import LocalSession, local_device
from raymaml.training.state import Validation
from raymaml.training.supervised import Ask, EndedEarly, SupervisedSession
from raymaml.training.worker import train_worker


def run_alone(leg: Leg, device: torch.device, ask: Ask, stop: Callable[[], bool]) -> None:
    """Run a leg in this process, from its last checkpoint on.

    Args:
        leg: the trial.
        device: where it learns.
        ask: takes each validation up to the end of the leg, and tells whether it goes on.
        stop: asked at every outer step; the run is saved there when it is true.

    Raises:
        UserError: data do not fit, a loss is not finite, or another process writes the run.
    """
    run = open_run(leg.config, device)
    session = SupervisedSession(LocalSession(run.data, device), up_to(leg, ask), stop)
    make_folder(run.folder, "run_dir")
    with contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None)


def up_to(leg: Leg, ask: Ask) -> Ask:
    """Return ``ask``, with the answer no at the end of the leg."""

    def answer(validation: Validation) -> bool:
        return ask(validation) and validation.step < leg.until

    return answer


@contextlib.contextmanager
def local_runner(_sweep: Sweep) -> Iterator[RunLegs]:
    """Run the trials in this process, in their order, without Ray."""
    yield _run_in_order


def _run_in_order(legs: Sequence[Leg], referee: Referee) -> None:
    stop = threading.Event()
    grace = max(leg.config.cluster.grace_seconds for leg in legs)
    with on_interrupt(stop.set, grace):
        for leg in legs:
            if stop.is_set():
                break
            try:
                run_alone(leg, local_device(leg.config.cluster), asking(leg, referee), stop.is_set)
            except StorageError:  # no failing of the trial's
                raise
            except UserError as error:
                referee.fail(leg.trial, "; ".join(error.problems))
    if stop.is_set():
        raise stopped()


def asking(leg: Leg, referee: Referee) -> Ask:
    """Return what asks the referee about the validations of a leg."""
    return lambda validation: referee.report(leg.trial, leg.config.name, validation)
