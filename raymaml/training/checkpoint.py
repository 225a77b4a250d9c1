"""Checkpoints: folders that a person can read, whole or absent, the last and the best kept.

``checkpoint_00000500/`` holds the state before outer step 500: ``params.pt`` (meta-parameters and
running moments, all that evaluation needs), ``optimizer.pt`` (what else training needs), and
``checkpoint.json``.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

import raymaml
from raymaml.config.schema import Config
from raymaml.data.files import new_folder, sha256_of_file
from raymaml.errors import UserError
from raymaml.training.session import Session
from raymaml.training.state import TrainState, Validation
from raymaml.types import Params

SCHEMA_VERSION = 1
CARD = "checkpoint.json"
_NAME = re.compile(r"checkpoint_(\d{8,})")


class CheckpointCard(BaseModel):
    """The readable part of a checkpoint."""

    # JSON knows no infinity, which is what the interval of a single validation episode is.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    step: int
    validation: Validation | None
    best: Validation | None
    files: dict[str, str]
    """sha256 by file name."""
    image_shape: tuple[int, int, int]
    bank_hash: str
    versions: dict[str, str]
    config: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run folder, written by rank 0 and read by all workers."""

    def __init__(
        self, folder: Path, config: Config, *, image_shape: tuple[int, int, int], bank_hash: str
    ) -> None:
        self.folder = folder
        self._config = config
        self._image_shape = image_shape
        self._bank_hash = bank_hash

    def restore(self, state: TrainState, session: Session) -> None:
        """Load the newest checkpoint into ``state``; leave it as it is where there is none.

        All workers load what rank 0 finds.

        Raises:
            UserError: the checkpoint is damaged.
        """
        step = session.from_rank_zero(max(list_steps(self.folder), default=-1))
        if step < 0:
            return
        path = checkpoint_path(self.folder, step)
        card = read_card(path)
        names = ("params.pt", "optimizer.pt")
        state.load({name: load_tensors(path, card, name, session.device) for name in names})
        state.step, state.validation, state.best = card.step, card.validation, card.best

    def save(self, state: TrainState, session: Session) -> None:
        """Write a checkpoint, drop the ones no longer needed, and report it.

        Raises:
            RuntimeError: the workers' weights differ (a defect, or broken hardware).
        """
        _require_equal_replicas(state, session)
        path = checkpoint_path(self.folder, state.step)
        if session.rank == 0:
            self._write(path, state)
            keep = {state.step} | ({state.best.step} if state.best else set())
            for step in set(list_steps(self.folder)) - keep:
                _discard(checkpoint_path(self.folder, step))
        metrics = {} if state.validation is None else {"val_accuracy": state.validation.accuracy}
        session.report({"step": state.step, **metrics}, path)

    def _write(self, path: Path, state: TrainState) -> None:
        if path.exists():
            # Written before by a run that was then stopped; only its validation can differ.
            if read_card(path).validation == state.validation:
                return
            _discard(path)
        write_checkpoint(
            path, state, self._config, image_shape=self._image_shape, bank_hash=self._bank_hash
        )


def write_checkpoint(
    path: Path,
    state: TrainState,
    config: Config,
    *,
    image_shape: tuple[int, int, int],
    bank_hash: str,
) -> None:
    """Write the checkpoint folder ``path``, whole or not at all."""
    with new_folder(path) as folder:
        for name, tensors in state.tensors().items():
            torch.save(tensors, folder / name)
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
        (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "raymaml": raymaml.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint before outer step ``step``."""
    return folder / f"checkpoint_{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints, ascending."""
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("checkpoint_*"))
    return sorted(int(match[1]) for match in matches if match)


def find_checkpoint(folder: Path, which: Literal["best", "last"]) -> Path:
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


def read_card(path: Path) -> CheckpointCard:
    """Read the readable part of a checkpoint.

    Raises:
        UserError: it is missing, damaged, or of another schema version.
    """
    try:
        content = json.loads((path / CARD).read_text(encoding="utf-8"))
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{path / CARD}: has schema_version {found}, this raymaml reads {SCHEMA_VERSION};"
                " use the raymaml that wrote it"
            )
        return CheckpointCard.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        raise _damaged(path, CARD, str(error)) from None


def load_tensors(
    path: Path, card: CheckpointCard, name: str, device: torch.device
) -> dict[str, Any]:
    """Load one file of a checkpoint, weights only, after checking its hash.

    Raises:
        UserError: the file is missing or altered, or holds anything but tensors and plain values.
    """
    file = path / name
    if not file.is_file():
        raise _damaged(path, name, "it is missing")
    if sha256_of_file(file) != card.files.get(name):
        raise _damaged(path, name, "its sha256 is not the one in checkpoint.json")
    try:
        tensors: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except UnpicklingError:
        raise _damaged(path, name, "it holds more than tensors, which is not loaded") from None
    return tensors


def check_last(folder: Path) -> None:
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
            if path.exists():
                raise
            # A worker that outlives its killed driver has just dropped it for a newer one.


def require_same_model(path: Path, config: Config, image_shape: tuple[int, int, int]) -> None:
    """Check that the weights of a checkpoint fit the model that ``config`` and images ask for.

    Raises:
        UserError: naming everything that differs.
    """
    card = read_card(path)
    pairs = {
        f"model.{key}": (card.config["model"].get(key), value)
        for key, value in config.model.model_dump(mode="json").items()
    }
    pairs["the image shape (C, H, W)"] = (card.image_shape, image_shape)
    if config.model.head == "learned":
        ways = card.config["episodes"]["train"]["num_ways"]
        pairs["num_ways"] = (ways, config.episodes.test.num_ways)
    problems = [
        f"{path}: was trained with {key} = {had!r}, config and bank now say {has!r}; give the old"
        " value, or train under another name"
        for key, (had, has) in pairs.items()
        if had != has
    ]
    if problems:
        raise UserError(*problems)


def require_fitting(path: Path, params: Params, wanted: Params) -> None:
    """Check that the weights from the checkpoint ``path`` are all that are ``wanted``.

    Others are allowed beside them: the running moments of a model that is judged by another norm.

    Raises:
        UserError: naming what is missing, or of another shape.
    """
    problems = []
    if missing := [name for name in wanted if name not in params]:
        names = ", ".join(missing)
        problems.append(
            f"{path}: holds no {names}, which the model needs; judge it as it was trained"
        )
    problems += [
        f"{path}: {name} has the shape {list(params[name].shape)}, the model needs"
        f" {list(value.shape)}; judge it as it was trained"
        for name, value in wanted.items()
        if name in params and params[name].shape != value.shape
    ]
    if problems:
        raise UserError(*problems)


def _damaged(path: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{path / name}: is damaged ({reason}); move {path} away to go on from the checkpoint"
        " before it, or restore it from a copy"
    )


def _discard(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for a whole."""
    hidden = path.with_name(f".{path.name}.partial-old")  # what a kill leaves, the next run removes
    path.rename(hidden)
    shutil.rmtree(hidden)


def _require_equal_replicas(state: TrainState, session: Session) -> None:
    digest = torch.tensor([[state.digest()]], device=session.device)
    digests = session.gather(digest, [1] * session.world_size)
    if (digests != digest).any():
        raise RuntimeError(
            f"outer step {state.step}: the workers' weights differ ({digests[:, 0].tolist()});"
            " nothing was saved"
        )


def copy_checkpoint(path: Path, folder: Path) -> Path:
    """Copy a checkpoint into another run folder, whole or not at all, unless it is there."""
    copy = folder / path.name
    if not copy.exists():
        with new_folder(copy) as partial:
            for file in path.iterdir():
                shutil.copyfile(file, partial / file.name)
    return copy


def copy_for_going_on(source: Path, folder: Path, step: int) -> None:
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
