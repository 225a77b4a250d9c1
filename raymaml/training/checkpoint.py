"""Checkpoints: folders that a person can read, whole or absent, the last and the best kept.

``checkpoint_00000500/`` holds the state before outer step 500: ``params.pt`` (meta-parameters and
running moments, all that evaluation needs), ``optimizer.pt`` (what else training needs), and
``checkpoint.json``.
"""

from __future__ import annotations

import hashlib
import io
import platform
from collections.abc import Callable
from typing import Any

import torch

import raymaml
from raymaml.common.errors import UserError, gathered
from raymaml.common.logs import LOG
from raymaml.common.untrusted import shortened
from raymaml.config.schema import Config
from raymaml.storage.files import (
    new_folder,
    read_bytes,
    remove_folder,
    sha256_of_file,
    write_text,
)
from raymaml.storage.place import Place
from raymaml.training.card import (
    CARD,
    SCHEMA_VERSION,
    CheckpointCard,
    CheckpointFile,
    checkpoint_path,
    damaged,
    find_checkpoint,
    list_steps,
    read_card,
    require_of_run,
    trained_config,
)
from raymaml.training.identity import Identity
from raymaml.training.session import Session
from raymaml.training.state import TrainState, load_params
from raymaml.training.tensor_file import is_plain, load_optimizer, read_tensors
from raymaml.types import Params

__all__ = [
    "CheckpointStore",
    "adopt_converted",
    "check_last",
    "checkpoint_path",
    "find_checkpoint",
    "list_steps",
    "load_tensors",
    "read_card",
    "require_fitting",
    "require_same_model",
    "trained_config",
    "versions",
    "write_checkpoint",
]


class CheckpointStore:
    """The checkpoints of one run folder, written by rank 0 and read by all workers."""

    def __init__(self, folder: Place, identity: Identity) -> None:
        self.folder = folder
        self._identity = identity
        self._required: list[Callable[[], None]] = []

    def require(self, check: Callable[[], None]) -> None:
        """Have ``check`` called before a state is kept; it raises where one must not be."""
        self._required.append(check)

    def restore(self, state: TrainState, session: Session) -> None:
        """Load the newest checkpoint into ``state``; leave it as it is where there is none.

        All workers load what rank 0 finds.

        Raises:
            UserError: the checkpoint is damaged, or of another run.
        """
        step = session.from_rank_zero(max(list_steps(self.folder), default=-1))
        if step < 0:
            LOG.info("begins with the initial weights", extra={"state": state})
            return
        path = checkpoint_path(self.folder, step)
        require_of_run(path, self._identity)
        card = read_card(path)
        params = load_tensors(path, card, "params.pt", session.device)
        require_fitting(path, params, state.params | state.learner.moments)
        optimizer = load_tensors(path, card, "optimizer.pt", session.device)
        try:
            load_optimizer(state.optimizer, optimizer)
        except ValueError as error:
            raise damaged(path, "optimizer.pt", str(error)) from None
        load_params(state.learner, params)
        state.step, state.validation, state.best = card.step, card.validation, card.best
        LOG.info("goes on from %s", path.name, extra={"state": state})

    def save(self, state: TrainState, session: Session) -> None:
        """Write a checkpoint, drop the ones no longer needed, and report it.

        Raises:
            UserError: the data were altered, another process writes here, or the storage refuses.
            RuntimeError: the workers' weights differ (a defect, or broken hardware).
        """
        for check in self._required:
            check()
        _require_equal_replicas(state, session)
        path = checkpoint_path(self.folder, state.step)
        if session.rank == 0:
            self._write(path, state)
            keep = {state.step} | ({state.best.step} if state.best else set())
            for step in set(list_steps(self.folder)) - keep:
                remove_folder(checkpoint_path(self.folder, step), CARD)
        metrics = {} if state.validation is None else {"val_accuracy": state.validation.accuracy}
        session.report({"step": state.step, **metrics}, path)
        LOG.info("checkpoint %s", path.name, extra={"state": state})

    def _write(self, path: Place, state: TrainState) -> None:
        if state.step in list_steps(self.folder):
            # Written before by a run that was then stopped; only its validation can differ.
            card = read_card(path)
            if card.validation != state.validation:
                judged = {"validation": state.validation, "best": state.best}
                write_text(path / CARD, card.model_copy(update=judged).as_text())
            return
        write_checkpoint(path, state, self._identity)


def write_checkpoint(path: Place, state: TrainState, identity: Identity) -> None:
    """Write the checkpoint folder ``path``, whole or not at all."""
    with new_folder(path, CARD) as folder:
        for name, tensors in state.tensors().items():
            # By way of memory: torch hides what a disk that is full says, "unexpected pos 576".
            content = io.BytesIO()
            torch.save(tensors, content)
            (folder / name).write_bytes(content.getbuffer())
        card = CheckpointCard(
            schema_version=SCHEMA_VERSION,
            step=state.step,
            validation=state.validation,
            best=state.best,
            files={file.name: sha256_of_file(file) for file in sorted(folder.iterdir())},
            image_shape=identity.image_shape,
            bank_hash=identity.bank_hash,
            encoder_source=identity.encoder_source,
            versions=versions(),
            config=identity.config.model_dump(mode="json"),
        )
        (folder / CARD).write_text(card.as_text(), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "raymaml": raymaml.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def load_tensors(
    path: Place, card: CheckpointCard, name: CheckpointFile, device: torch.device
) -> dict[str, Any]:
    """Load one file of a checkpoint, weights only, after checking its hash.

    Raises:
        UserError: the file is missing or altered, or holds anything but tensors and plain values.
    """
    try:
        content = read_bytes(path / name)
    except OSError:
        raise damaged(path, name, "it is missing") from None
    if hashlib.sha256(content).hexdigest() != card.files.get(name):
        raise damaged(path, name, "its sha256 is not the one in checkpoint.json")
    try:
        tensors = read_tensors(content, device)
        if not isinstance(tensors, dict):
            raise ValueError("it holds no tensors by name")
    except ValueError as error:
        raise damaged(path, name, str(error)) from None
    return tensors


def check_last(folder: Place, identity: Identity) -> None:
    """Check that the checkpoint that a run would go on from, if any, is whole, and is of the run.

    Raises:
        UserError: it is damaged, or it or the best one is of another run.
    """
    while steps := list_steps(folder):
        path = checkpoint_path(folder, steps[-1])
        try:
            card = read_card(path)
            for name in card.files:
                load_tensors(path, card, name, torch.device("cpu"))
            require_of_run(path, identity)
            return
        except UserError:
            if list_steps(folder) == steps:
                raise
            # A worker that outlives its killed driver has just dropped one for a newer one.


def require_same_model(path: Place, config: Config, image_shape: tuple[int, int, int]) -> None:
    """Check that the weights of a checkpoint fit the model that ``config`` and images ask for.

    Raises:
        UserError: naming everything that differs.
    """
    card, trained = read_card(path), trained_config(path, config)
    model = trained.model.model_dump(mode="json")
    pairs: dict[str, tuple[Any, Any]] = {
        f"model.{key}": (model[key], value)
        for key, value in config.model.model_dump(mode="json").items()
    }
    pairs["the image shape (C, H, W)"] = (card.image_shape, image_shape)
    if config.model.head == "learned":
        ways = trained.episodes.train.num_ways
        pairs["num_ways"] = (ways, config.episodes.test.num_ways)
    with gathered() as mistakes:
        for key, (had, has) in pairs.items():
            if had != has:
                mistakes.add(
                    f"{path}: was trained with {key} = {shortened(had)}, config and bank now say"
                    f" {has!r}",
                    remedy="give the old value, or train under another name",
                )


def require_fitting(path: Place, params: Params, wanted: Params) -> None:
    """Check that the weights from the checkpoint ``path`` are all that are ``wanted``.

    Others are allowed beside them: the running moments of a model that is judged by another norm.

    Raises:
        UserError: naming what is missing, or of another shape.
    """
    problems = []
    if missing := [name for name in wanted if not _is_number(params.get(name))]:
        problems.append(f"{path}: holds no {', '.join(missing)}, which the model needs")
    problems += [
        f"{path}: {name} has the shape {list(params[name].shape)}, the model needs"
        f" {list(value.shape)}"
        for name, value in wanted.items()
        if name not in missing and params[name].shape != value.shape
    ]
    if problems:
        raise UserError(*problems, remedy="judge it as it was trained")


def _is_number(value: object) -> bool:
    return is_plain(value) and torch.is_floating_point(value)  # type: ignore[arg-type]


def _require_equal_replicas(state: TrainState, session: Session) -> None:
    digest = torch.tensor([[state.digest()]], device=session.device)
    digests = session.gather(digest, [1] * session.world_size)
    if (digests != digest).any():
        raise RuntimeError(
            f"outer step {state.step}: the workers' weights differ ({digests[:, 0].tolist()});"
            " nothing was saved"
        )


def adopt_converted(folder: Place, bank_hash: str) -> None:
    """Have converted weights, if a run goes on from such, be of the bank of that run."""
    for step in list_steps(folder):
        card = read_card(checkpoint_path(folder, step))
        if card.bank_hash == "":
            card = card.model_copy(update={"bank_hash": bank_hash})
            write_text(checkpoint_path(folder, step) / CARD, card.as_text())
