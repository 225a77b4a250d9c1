"""Checkpoints: folders that a person can read, whole or absent.

``checkpoint_00000500/`` holds the state before outer step 500: ``params.safetensors``
(meta-parameters and running moments, all that evaluation needs; ``params.pt`` up to schema version
2), ``optimizer.pt`` (the rest that training needs), and ``checkpoint.json``, its card.
"""

from __future__ import annotations

import hashlib
import io
import platform
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import raymaml
from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.common.untrusted import checked, parse_json, shortened
from raymaml.config.base import Count
from raymaml.config.model import ModelConfig
from raymaml.data.bank_format import ImageShape
from raymaml.data.preprocessing import Preprocessing
from raymaml.meta.learner import MetaLearner
from raymaml.models.libraries import library_versions
from raymaml.storage.files import exists, new_folder, reaching, read_bytes, sha256_of_file
from raymaml.storage.place import Place, is_remote
from raymaml.training.identity import Identity
from raymaml.training.state import (
    WEIGHTS,
    TrainState,
    Validation,
    load_params,
    require_fitting,
)
from raymaml.training.tensor_file import read_tensors, read_weights, weights_bytes
from raymaml.types import Params

SCHEMA_VERSION = 3
"""2: the images of an episode stand in random order; 3: weights are safetensors, and the card knows
the way from a picture to its tensor and the classes of training."""
_READABLE = range(1, SCHEMA_VERSION + 1)
CARD = "checkpoint.json"
CheckpointFile = Literal["params.safetensors", "params.pt", "optimizer.pt"]
Which = Literal["best", "last", "ensemble"]
"""``evaluation.checkpoint``."""
_NAME = re.compile(r"checkpoint_(\d{8,})")


class CheckpointCard(BaseModel):
    """The readable part of a checkpoint."""

    # JSON knows no infinity; a card of an earlier version may hold one as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    step: Count
    validation: Validation | None
    best: Validation | None
    runners_up: tuple[Validation, ...] = ()
    """Of the other best checkpoints that the run keeps, the best first (``outer.keep_best``)."""
    files: dict[CheckpointFile, Annotated[str, Field(min_length=64)]]
    """sha256 by file name; no other file can be named, least of all a path."""
    image_shape: ImageShape
    bank_hash: str
    encoder_source: str | None = None
    """Of an encoder of one's own, see ``raymaml.models.source``."""
    versions: dict[str, str]
    config: dict[str, Any]
    preprocessing: Preprocessing | None = None
    """None in older cards, and for converted weights whose moments are unknown."""
    train_classes: tuple[str, ...] = ()
    """Empty in older cards, and for converted weights."""

    @property
    def leaders(self) -> tuple[Validation, ...]:
        """The validations of the best checkpoints that the run keeps, the best first."""
        return () if self.best is None else (self.best, *self.runners_up)

    @property
    def weights(self) -> CheckpointFile:
        """The name of the file of weights."""
        return WEIGHTS if WEIGHTS in self.files else "params.pt"

    def as_text(self) -> str:
        """Return the content of the file."""
        return self.model_dump_json(indent=2) + "\n"


_CARD = TypeAdapter(CheckpointCard)


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


def saved_step(folder: Place) -> int:
    """Return the step of the newest checkpoint, -1 if there is none."""
    return max(list_steps(folder), default=-1)


def find_checkpoint(folder: Place, which: Literal["best", "last"]) -> Place:
    """Return the newest checkpoint of a run, or the one with the best validation accuracy.

    Raises:
        UserError: there is none, or the best one differs from what the newest one says.
    """
    return find_checkpoints(folder, which)[0]


def find_checkpoints(folder: Place, which: Which) -> tuple[Place, ...]:
    """Return the newest checkpoint of a run, the best one, or all best ones that it keeps.

    Raises:
        UserError: there is none, or a best one differs from what the newest one says.
    """
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"{folder}: holds no checkpoint", remedy="run `raymaml train CONFIG` first")
    last = checkpoint_path(folder, steps[-1])
    if which == "ensemble":
        count = max(1, len(read_card(last).leaders))
        return tuple(best_checkpoint(last, place) for place in range(count))
    return (last if which == "last" else best_checkpoint(last),)


def best_checkpoint(last: Place, place: int = 0) -> Place:
    """Return the best checkpoint of the run whose newest is ``last``, or the next at ``place``.

    Raises:
        UserError: it is not there, or was judged otherwise than ``last`` says.
    """
    leaders = read_card(last).leaders
    if not leaders:
        return last
    best, name = leaders[place], f"runners_up[{place - 1}]" if place else "best"
    path = checkpoint_path(last.parent, best.step)
    if not exists(path):
        less = "evaluation.checkpoint=best" if place else "evaluation.checkpoint=last"
        judge = "judge the best one" if place else f"judge {last.name}"
        raise UserError(
            f"{last / CARD}: {name}.step is {best.step}, but {path} is not there",
            remedy=f"restore it from a copy, or {judge} by {less}",
        )
    if (found := read_card(path).validation) != best:
        raise UserError(
            f"{path / CARD}: validation is {found}, but {name} of {last / CARD} is {best}",
            remedy=move_away(last),
        )
    return path


def read_card(path: Place) -> CheckpointCard:
    """Read the readable part of a checkpoint.

    Raises:
        UserError: it is missing, damaged, of another schema version, or contradicts itself or the
            name of its folder.
    """
    try:
        content = parse_json(read_bytes(path / CARD))
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found not in _READABLE:
            raise UserError(
                f"{path / CARD}: has schema_version {shortened(found)}, this raymaml reads"
                f" 1 to {SCHEMA_VERSION}",
                remedy="use the raymaml that wrote it",
            )
        content.pop("inherited_from", None)  # earlier versions had population-based training
        card = checked(_CARD, content)
        if card.weights not in card.files:
            raise ValueError(f"it names no {WEIGHTS}")
    except (OSError, ValueError) as error:
        raise damaged(path, CARD, reason_of(error)) from None
    match = _NAME.fullmatch(path.name)
    with gathered() as mistakes:
        for problem in _contradictions(card, int(match[1]) if match else None):
            mistakes.add(f"{path / CARD}: {problem}", move_away(path))
    return card


def _contradictions(card: CheckpointCard, number: int | None) -> Iterator[str]:
    """Yield where a card contradicts itself, or the ``number`` in the name of its folder."""
    if number is not None and number != card.step:
        yield f"step is {card.step}, the folder's name says {number}"
    if (known := card.preprocessing) and known.image_shape != card.image_shape:
        yield f"image_shape is {card.image_shape}, preprocessing.image_shape {known.image_shape}"
    last, best = card.validation, card.best
    if last is None or best is None:
        if best is not None:
            yield f"validation is absent, best is of step {best.step}"
        if last is not None:
            yield f"best is absent, validation is of step {last.step}"
        return
    if last.step > card.step:  # it is less where a run stopped between two validations
        yield f"validation.step is {last.step}, step is {card.step}"
    if best.step > last.step:
        yield f"best.step is {best.step}, validation.step is {last.step}"
    elif best.accuracy < last.accuracy:
        yield f"best.accuracy is {best.accuracy}, validation.accuracy is {last.accuracy}"
    elif best.step == last.step and best != last:
        yield f"best and validation differ, both of step {best.step}"
    ranks = [(-each.accuracy, each.step) for each in card.leaders]
    if ranks != sorted(set(ranks)):
        yield "best and runners_up are not in the order of accuracy"
    if late := [each.step for each in card.runners_up if each.step > last.step]:
        yield f"runners_up are of steps {late}, validation.step is {last.step}"


def write_checkpoint(path: Place, state: TrainState, identity: Identity) -> None:
    """Write the checkpoint folder ``path``, whole or not at all."""
    with new_folder(path, CARD) as folder:
        # By way of memory: torch hides what a disk that is full says, "unexpected pos 576".
        content = io.BytesIO()
        torch.save(state.optimizer.state_dict(), content)
        (folder / "optimizer.pt").write_bytes(content.getbuffer())
        (folder / WEIGHTS).write_bytes(weights_bytes(state.weights))
        card = CheckpointCard(
            schema_version=SCHEMA_VERSION,
            step=state.step,
            **judged(state),
            files={file.name: sha256_of_file(file) for file in sorted(folder.iterdir())},
            image_shape=identity.image_shape,
            bank_hash=identity.bank_hash,
            encoder_source=identity.encoder_source,
            versions=versions(identity.config.model),
            config=identity.config.model_dump(mode="json"),
            preprocessing=identity.preprocessing,
            train_classes=identity.train_classes,
        )
        (folder / CARD).write_text(card.as_text(), encoding="utf-8")


def judged(state: TrainState) -> dict[str, Any]:
    """Return the part of a card that names validations."""
    return {
        "validation": state.validation,
        "best": state.best,
        "runners_up": state.leaders[1:],
    }


def versions(model: ModelConfig) -> dict[str, str]:
    """Return the versions that a result of a model depends on."""
    return {
        "raymaml": raymaml.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **library_versions(model),
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
        tensors = (read_weights if name == WEIGHTS else read_tensors)(content, device)
        if not isinstance(tensors, dict):
            raise ValueError("it holds no tensors by name")
    except ValueError as error:
        raise damaged(path, name, str(error)) from None
    return tensors


def weights_of(path: Place, device: torch.device) -> Params:
    """Load the weights of a checkpoint, as ``load_tensors`` does."""
    card = read_card(path)
    return load_tensors(path, card, card.weights, device)


def load_weights(learner: MetaLearner, path: Place, device: torch.device) -> None:
    """Load the weights of a checkpoint into a learner.

    Raises:
        UserError: the file is damaged, or does not fit.
    """
    params = weights_of(path, device)
    require_fitting(path, params, learner.params | learner.moments)
    load_params(learner, params)


def damaged(path: Place, name: str, reason: str) -> UserError:
    """Return what to say of a file of the checkpoint ``path`` that cannot be used."""
    return UserError(f"{path / name}: is damaged ({reason})", remedy=move_away(path))


def move_away(path: Place) -> str:
    """Return the remedy for a checkpoint that cannot be used."""
    return f"move {path} away to go on from the checkpoint before it, or restore it from a copy"
