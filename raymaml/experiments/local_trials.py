"""Trials of a sweep in one process each, and one after the other without Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch

from raymaml.common.errors import StorageError, UserError
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.schema import Config
from raymaml.experiments.journal import Journal
from raymaml.experiments.sweep import Sweep, Trial
from raymaml.storage.files import make_folder
from raymaml.training.run import open_run
from raymaml.training.session import Ask, EndedEarly, LocalSession
from raymaml.training.settings import local_device
from raymaml.training.worker import train_worker


def train_alone(config: Config, device: torch.device, ask: Ask, stop: Callable[[], bool]) -> None:
    """Train a trial in this process, from its last checkpoint on.

    Args:
        config: the trial's.
        device: the device to learn on.
        ask: called with each validation; returns whether the trial goes on.
        stop: called at every outer step; the run is saved there, and ends, when it is true.

    Raises:
        UserError: data do not fit, a loss is not finite, or another process writes the run.
    """
    run = open_run(config, device)
    session = LocalSession(run.data, device, ask, stop)
    make_folder(run.folder, "run_dir")
    with contextlib.suppress(EndedEarly):
        train_worker(run, session, lambda _line: None)


def run_in_order(sweep: Sweep, trials: Iterator[Trial], journal: Journal) -> None:
    """Run the trials in this process, in their order, without Ray."""
    stop = threading.Event()
    with on_interrupt(stop.set, sweep.base.cluster.grace_seconds):
        for trial in trials:
            device = local_device(trial.config.cluster)
            try:
                train_alone(
                    trial.config, device, partial(journal.report, trial.number), stop.is_set
                )
            except StorageError:  # not a fault of the trial
                raise
            except UserError as error:
                journal.fail(trial.number, "; ".join(error.problems))
            if stop.is_set():
                raise stopped()
