"""The run folder: whose it is, who may write it, and what it was started with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from raymaml.common.errors import StorageError, UserError, gathered
from raymaml.common.untrusted import checked, json_text, parse_json, shortened
from raymaml.config.load import dump_config
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.models.source import source_files
from raymaml.storage.files import (
    exists,
    make_folder,
    reaching,
    read_bytes,
    remove,
    write_text,
)
from raymaml.storage.lease import hold
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import remove_partial
from raymaml.training.card import require_agreement
from raymaml.training.checkpoint import (
    adopt_converted,
    check_last,
    find_checkpoint,
    list_steps,
    trained_config,
)
from raymaml.training.identity import (
    IDENTITY,
    SCHEMA_VERSION,
    damaged_identity,
    deciding,
    differences,
    flat,
    read_identity,
)
from raymaml.training.run import Run

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
        _check_identity(run)
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
    """Tell whether a stop was asked for."""
    return exists(folder / STOP)


def watch_stop(folder: Place) -> Callable[[], bool]:
    """Return what tells whether a stop was asked for, to be asked at every outer step."""
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
    """Write what the run is started, or gone on, with; the sole writer does it."""
    folder, shards = run.folder, run.data.train.shards
    if not exists(folder / IDENTITY):
        adopt_converted(folder, shards.bank_hash)
        identity = {
            "schema_version": SCHEMA_VERSION,
            **run.identity.of_run(shards.manifest_hash),
            "classes": _classes(run.data.train.loader.bank),
        }
        write_text(folder / IDENTITY, json_text(identity, indent=2) + "\n")
    write_text(folder / "config.yaml", dump_config(run.config))


def is_done(config: Config) -> bool:
    """Tell whether no outer step of the run of ``config`` is left to do."""
    return saved_step(config.run_folder) >= config.outer.num_steps


def saved_step(folder: Place) -> int:
    """Return the step of the last checkpoint, -1 if there is none."""
    return max(list_steps(folder), default=-1)


def require_trained_by(config: Config) -> None:
    """Check that the run was trained by what ``config`` says of learning.

    Raises:
        UserError: there is no run, or it was not.
    """
    folder = config.run_folder
    trained = trained_config(find_checkpoint(folder, "last"), config)
    _require_same(folder, deciding(trained), deciding(config))


def require_of_its_run(path: Place, config: Config) -> None:
    """Check that a checkpoint says what the ``run.json`` beside it says, if there is one.

    Raises:
        UserError: naming everything that differs.
    """
    if exists(path.parent / IDENTITY):
        _, identity = read_identity(path.parent / IDENTITY)
        unsaid = {*_OF_THE_DATA, *(["encoder_source"] if not identity["encoder_source"] else [])}
        wanted = {key: value for key, value in identity.items() if key not in unsaid}
        require_agreement(path, config, wanted, f"{IDENTITY} says")


_CLASSES = TypeAdapter(dict[str, dict[str, str]] | None)


def read_classes(folder: Place) -> dict[str, dict[str, str]] | None:
    """Return the digests of the classes that a run learned from, by split and name.

    None where it does not say them: it is of an older version, or its bank was not at hand.

    Raises:
        UserError: ``run.json`` is damaged.
    """
    path = folder / IDENTITY
    if not exists(path):
        return None
    try:
        return checked(_CLASSES, parse_json(read_bytes(path)).get("classes"))
    except (OSError, ValueError, AttributeError):
        raise damaged_identity(path) from None


def _classes(bank: ImageBank | None) -> dict[str, dict[str, str]] | None:
    if bank is None:
        return None
    return {
        split: {bank.classes[i].name: bank.class_digest(i) for i in bank.class_ids(split).tolist()}
        for split in ("train", "val")
    }


def _check_identity(run: Run) -> None:
    path = run.folder / IDENTITY
    if exists(path):
        version, before = read_identity(path)
        _require_same_source(run, before)
        before["encoder_source"] = run.identity.encoder_source  # has its own message
        now = flat(run.identity.of_run(run.data.train.shards.manifest_hash))
        if version == 1:  # its episodes cannot be sampled again, and it is done
            now |= {key: before.get(key) for key in _OF_THE_DATA}
        _require_same(run.folder, before, now)
    check_last(run.folder, run.identity)


def _require_same_source(run: Run, before: Mapping[str, Any]) -> None:
    """Check that an encoder of one's own is the code that the run was started with.

    Raises:
        UserError: it was edited: the weights would be those of neither version.
    """
    model = run.config.model
    same = before.get("model.encoder") == model.encoder
    if not same or before["encoder_source"] in (None, run.identity.encoder_source):
        return
    files = ", ".join(map(str, source_files(model).values()))
    raise UserError(
        f"{run.folder}: the source of model.encoder {model.encoder} was edited after the run"
        f" was started ({files})",
        remedy="put it back as it was to go on, or choose another name",
    )


_OF_THE_DATA = ("train_manifest",)
"""What ``run.json`` says and a checkpoint does not."""


_REMEDIES = {
    "bank_hash": "import the old images again, or choose another name",
    "train_manifest": "put the old episodes back, or choose another name",
}


def _require_same(folder: Place, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    with gathered() as mistakes:
        for key, (had, has) in differences(before, now).items():
            mistakes.add(
                f"{folder}: was started with {key} = {shortened(had)}, the config now says {has!r}",
                remedy=_REMEDIES.get(
                    key, "give the old value to resume, or another name to start again"
                ),
            )
