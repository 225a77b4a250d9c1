"""The run folder: one owner, one writer, and the config that it was started with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from raymaml.common.errors import StorageError, UserError
from raymaml.common.untrusted import json_text
from raymaml.config.load import dump_config
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.storage.files import exists, make_folder, reaching, remove, write_text
from raymaml.storage.lease import hold
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import remove_partial
from raymaml.training.checkpoint import saved_step
from raymaml.training.identity import IDENTITY, SCHEMA_VERSION, Classes
from raymaml.training.run import Run
from raymaml.training.store import adopt_converted, check_last
from raymaml.training.trust import require_same_start

STOP = "STOP"
_LOOK_EVERY = 2.0
"""Seconds between two looks for a stop at a URI: a step should not wait for the network."""


@contextlib.contextmanager
def claim(run: Run) -> Iterator[None]:
    """Hold the run folder for the length of the block, making it if need be; nothing in it changes.

    Raises:
        UserError: another process holds it, it belongs to another config, its last checkpoint is
            damaged, or it cannot be made.
    """
    folder = run.folder
    make_folder(folder, "run_dir")
    taken = UserError(
        f"{folder}: another process is writing this run",
        remedy="wait for it, stop it, or choose another name",
    )
    with hold(folder / ".lock", taken=taken):
        require_same_start(folder, run.identity)
        check_last(folder, run.identity)
        withdraw_stop(folder)
        yield


@contextlib.contextmanager
def sole_writer(folder: Place) -> Iterator[Callable[[], None]]:
    """Hold the right to write checkpoints and metrics; rank 0 takes it, and gets a check for it.

    The worker of a driver that was just killed may live a few seconds longer: wait for its end.
    The right ends with the process, however that dies.
    """
    taken = UserError(
        f"{folder}: a worker of an earlier run still writes here after 60 s", remedy="end it first"
    )
    with hold(folder / ".writer", taken=taken, timeout=60) as require_held:
        remove_partial(folder)
        yield require_held


def request_stop(folder: Place) -> None:
    """Ask the run to stop at the next step boundary."""
    with reaching(folder):
        (folder / STOP).touch()


def withdraw_stop(folder: Place) -> None:
    """Forget that a stop was asked for."""
    remove(folder / STOP)


def stop_requested(folder: Place) -> bool:
    """Return whether a stop was asked for."""
    return exists(folder / STOP)


def watch_stop(folder: Place) -> Callable[[], bool]:
    """Return a function for every outer step: whether a stop was asked for."""
    next_look = 0.0

    def asked() -> bool:
        nonlocal next_look
        if time.monotonic() < next_look:
            return False
        if is_remote(folder):
            next_look = time.monotonic() + _LOOK_EVERY
        with contextlib.suppress(StorageError):  # where it is away for a moment: look again
            return stop_requested(folder)
        return False

    return asked


def write_identity(run: Run) -> None:
    """Write the config and, in a new run, its identity. The sole writer does it."""
    folder = run.folder
    if not exists(folder / IDENTITY):
        adopt_converted(folder, run.identity.bank_hash)
        identity = {
            "schema_version": SCHEMA_VERSION,
            **run.identity.of_run(),
            "classes": _classes(run.data.train.loader.bank),
        }
        write_text(folder / IDENTITY, json_text(identity, indent=2) + "\n")
    write_text(folder / "config.yaml", dump_config(run.config))


def is_done(config: Config) -> bool:
    """Return whether no outer step of the run of ``config`` is left to do."""
    return saved_step(config.run_folder) >= config.outer.num_steps


def _classes(bank: ImageBank | None) -> Classes | None:
    if bank is None:
        return None
    return {
        split: {bank.classes[i].name: bank.class_digest(i) for i in bank.class_ids(split).tolist()}
        for split in ("train", "val")
    }
