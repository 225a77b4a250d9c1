"""Checkpoints: folders that a person can read, whole or absent, the last and the best kept.

``checkpoint_00000500/`` holds the state before outer step 500: ``params.pt`` (meta-parameters and
running moments, all that evaluation needs), ``optimizer.pt`` (what else training needs), and
``checkpoint.json``.
"""

from __future__ import annotations

import hashlib
import io
import platform
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import raymaml
from raymaml.config.base import Count
from raymaml.config.load import check_config, with_seed
from raymaml.config.schema import Config
from raymaml.data.bank_format import ImageShape
from raymaml.data.files import (
    exists,
    new_folder,
    reaching,
    read_bytes,
    remove_folder,
    sha256_of_file,
    write_text,
)
from raymaml.errors import UserError, reason_of
from raymaml.logs import LOG
from raymaml.outside import checked, parse_json, shortened
from raymaml.places import Place, is_remote
from raymaml.training.session import Session
from raymaml.training.state import TrainState, Validation, load_params
from raymaml.training.tensor_file import is_plain, load_optimizer, read_tensors
from raymaml.types import Params

SCHEMA_VERSION = 1
CARD = "checkpoint.json"
CheckpointFile = Literal["params.pt", "optimizer.pt"]
_NAME = re.compile(r"checkpoint_(\d{8,})")


class CheckpointCard(BaseModel):
    """The readable part of a checkpoint."""

    # JSON knows no infinity, which is what the interval of a single validation episode is.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    step: Count
    validation: Validation | None
    best: Validation | None
    files: dict[CheckpointFile, Annotated[str, Field(min_length=64)]]
    """sha256 by file name; no other file can be named, least of all a path."""
    image_shape: ImageShape
    bank_hash: str
    versions: dict[str, str]
    config: dict[str, Any]

    def as_text(self) -> str:
        """Return what the file holds."""
        return self.model_dump_json(indent=2) + "\n"


_CARD = TypeAdapter(CheckpointCard)


class CheckpointStore:
    """The checkpoints of one run folder, written by rank 0 and read by all workers."""

    def __init__(
        self,
        folder: Place,
        config: Config,
        *,
        image_shape: tuple[int, int, int],
        bank_hash: str,
    ) -> None:
        self.folder = folder
        self._required: list[Callable[[], None]] = []
        self._config = config
        self._image_shape = image_shape
        self._bank_hash = bank_hash

    def require(self, check: Callable[[], None]) -> None:
        """Have ``check`` called before a state is kept; it raises where one must not be."""
        self._required.append(check)

    def restore(self, state: TrainState, session: Session) -> None:
        """Load the newest checkpoint into ``state``; leave it as it is where there is none.

        All workers load what rank 0 finds.

        Raises:
            UserError: the checkpoint is damaged.
        """
        step = session.from_rank_zero(max(list_steps(self.folder), default=-1))
        if step < 0:
            LOG.info("begins with the initial weights", extra={"state": state})
            return
        path = checkpoint_path(self.folder, step)
        card = read_card(path)
        params = load_tensors(path, card, "params.pt", session.device)
        require_fitting(path, params, state.params | state.learner.moments)
        optimizer = load_tensors(path, card, "optimizer.pt", session.device)
        try:
            load_optimizer(state.optimizer, optimizer)
        except ValueError as error:
            raise _damaged(path, "optimizer.pt", str(error)) from None
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
        write_checkpoint(
            path, state, self._config, image_shape=self._image_shape, bank_hash=self._bank_hash
        )


def write_checkpoint(
    path: Place,
    state: TrainState,
    config: Config,
    *,
    image_shape: tuple[int, int, int],
    bank_hash: str,
) -> None:
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
            image_shape=image_shape,
            bank_hash=bank_hash,
            versions=versions(),
            config=config.model_dump(mode="json"),
        )
        (folder / CARD).write_text(card.as_text(), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "raymaml": raymaml.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def checkpoint_path(folder: Place, step: int) -> Place:
    """Return the folder of the checkpoint before outer step ``step``."""
    return folder / f"checkpoint_{step:08d}"


def list_steps(folder: Place) -> list[int]:
    """Return the steps of all checkpoints, ascending.

    On disk a checkpoint without its card is a damaged one; at a URI it never became whole.
    """
    if is_remote(folder):
        with reaching(folder):
            names = [card.parent.name for card in folder.glob(f"checkpoint_*/{CARD}")]
    else:
        names = [path.name for path in folder.glob("checkpoint_*")]
    matches = (_NAME.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def find_checkpoint(folder: Place, which: Literal["best", "last"]) -> Place:
    """Return the newest checkpoint of a run, or the one with the best validation accuracy.

    Raises:
        UserError: there is none.
    """
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"{folder}: holds no checkpoint; run `raymaml train CONFIG` first")
    last = checkpoint_path(folder, steps[-1])
    best = read_card(last).best
    if which == "last" or best is None:
        return last
    return checkpoint_path(folder, best.step)


def read_card(path: Place) -> CheckpointCard:
    """Read the readable part of a checkpoint.

    Raises:
        UserError: it is missing, damaged, or of another schema version.
    """
    try:
        content = parse_json(read_bytes(path / CARD))
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{path / CARD}: has schema_version {shortened(found)}, this raymaml reads"
                f" {SCHEMA_VERSION}; use the raymaml that wrote it"
            )
        card = checked(_CARD, content)
        if "params.pt" not in card.files:
            raise ValueError("it names no params.pt")
    except (OSError, ValueError) as error:
        raise _damaged(path, CARD, reason_of(error)) from None
    return card


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
        raise _damaged(path, name, "it is missing") from None
    if hashlib.sha256(content).hexdigest() != card.files.get(name):
        raise _damaged(path, name, "its sha256 is not the one in checkpoint.json")
    try:
        tensors = read_tensors(content, device)
        if not isinstance(tensors, dict):
            raise ValueError("it holds no tensors by name")
    except ValueError as error:
        raise _damaged(path, name, str(error)) from None
    return tensors


def check_last(folder: Place) -> None:
    """Check that the checkpoint that a run would go on from, if any, is whole.

    Raises:
        UserError: it is damaged.
    """
    while steps := list_steps(folder):
        path = checkpoint_path(folder, steps[-1])
        try:
            card = read_card(path)
            for name in card.files:
                load_tensors(path, card, name, torch.device("cpu"))
            return
        except UserError:
            if exists(path):
                raise
            # A worker that outlives its killed driver has just dropped it for a newer one.


def trained_config(path: Place, own: Config) -> Config:
    """Return the config that a checkpoint was written with, but for source and places.

    Those are of ``own``: nothing is opened, imported or reached since a file says so, and a URI is
    enough for fsspec to do that.

    Raises:
        UserError: the checkpoint is damaged.
    """
    tree = read_card(path).config
    data = tree.get("data")
    if isinstance(data, Mapping):
        kept = {key: getattr(own.data, key) for key in ("source", "bank", "shards", "cache")}
        data = {**data, **kept}
    tree = {**tree, "episodes": with_seed(tree)}
    return check_config({**tree, "run_dir": own.run_dir, "data": data}, str(path / CARD))


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
    problems = [
        f"{path}: was trained with {key} = {shortened(had)}, config and bank now say {has!r}; give"
        " the old value, or train under another name"
        for key, (had, has) in pairs.items()
        if had != has
    ]
    if problems:
        raise UserError(*problems)


def require_fitting(path: Place, params: Params, wanted: Params) -> None:
    """Check that the weights from the checkpoint ``path`` are all that are ``wanted``.

    Others are allowed beside them: the running moments of a model that is judged by another norm.

    Raises:
        UserError: naming what is missing, or of another shape.
    """
    problems = []
    if missing := [name for name in wanted if not _is_number(params.get(name))]:
        names = ", ".join(missing)
        problems.append(
            f"{path}: holds no {names}, which the model needs; judge it as it was trained"
        )
    problems += [
        f"{path}: {name} has the shape {list(params[name].shape)}, the model needs"
        f" {list(value.shape)}; judge it as it was trained"
        for name, value in wanted.items()
        if name not in missing and params[name].shape != value.shape
    ]
    if problems:
        raise UserError(*problems)


def _is_number(value: object) -> bool:
    return is_plain(value) and torch.is_floating_point(value)  # type: ignore[arg-type]


def _damaged(path: Place, name: str, reason: str) -> UserError:
    return UserError(
        f"{path / name}: is damaged ({reason}); move {path} away to go on from the checkpoint"
        " before it, or restore it from a copy"
    )


def _require_equal_replicas(state: TrainState, session: Session) -> None:
    digest = torch.tensor([[state.digest()]], device=session.device)
    digests = session.gather(digest, [1] * session.world_size)
    if (digests != digest).any():
        raise RuntimeError(
            f"outer step {state.step}: the workers' weights differ ({digests[:, 0].tolist()});"
            " nothing was saved"
        )


def copy_checkpoint(path: Place, folder: Place) -> Place:
    """Copy a checkpoint into another run folder, whole or not at all, unless it is there."""
    copy = folder / path.name
    if not exists(copy / CARD):
        with new_folder(copy, CARD) as partial:
            for name in (CARD, *read_card(path).files):
                (partial / name).write_bytes(read_bytes(path / name))
    return copy


def copy_for_going_on(source: Place, folder: Place, step: int) -> None:
    """Have the run ``folder`` go on from what the run ``source`` had before outer step ``step``.

    Its best checkpoint comes along, and first: where the last one is, both are. A run that has gone
    on already stays as it is.
    """
    if any(found >= step for found in list_steps(folder)):
        return
    last = checkpoint_path(source, step)
    best = read_card(last).best
    for each in sorted({step} | ({best.step} if best else set())):
        copy_checkpoint(checkpoint_path(source, each), folder)
