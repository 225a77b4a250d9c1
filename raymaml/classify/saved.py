"""A classifier in a folder: weights before and after adaptation, and a card that a person reads."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, TypeAdapter

from raymaml.classify.adaptation import Adaptation
from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import checked, parse_json
from raymaml.config.base import PositiveInt, Section
from raymaml.config.model import ENCODERS
from raymaml.config.schema import Config
from raymaml.data.preprocessing import Preprocessing
from raymaml.meta.learner import MetaLearner
from raymaml.storage.files import exists, new_folder, read_bytes
from raymaml.storage.place import Place
from raymaml.training.checkpoint import versions
from raymaml.training.origin import without_places
from raymaml.training.state import build_learner, load_params, require_fitting
from raymaml.training.tensor_file import read_weights, weights_bytes
from raymaml.training.trained import TrainedModel
from raymaml.types import Fast, Params

CARD = "classifier.json"
THETA: Literal["theta.safetensors"] = "theta.safetensors"
ADAPTED: Literal["adapted.safetensors"] = "adapted.safetensors"
_MOST_CARD_BYTES = 64 << 20
_TYPES = r"str|object|bool|u?int(8|16|32|64)|float(16|32|64)"
_PLACES = {"model": {"weights"}}


class ClassifierCard(Section):
    """The readable part of a saved classifier."""

    schema_version: Literal[1]
    classes: Annotated[list[bool | int | float | str], Field(min_length=2)]
    label_type: Annotated[str, StringConstraints(pattern=f"^({_TYPES})$")]
    """Of NumPy."""
    shots: tuple[PositiveInt, ...]
    """Support images of each class."""
    protocol: str
    preprocessing: Preprocessing
    train_classes: tuple[str, ...]
    checkpoint: str
    origin: str
    """SHA-256 of the file of weights in that checkpoint."""
    versions: dict[str, str]
    files: dict[Literal["theta.safetensors", "adapted.safetensors"], str]
    """sha256 by file name."""
    config: dict[str, Any]
    """Of training, with stand-ins for source and places."""


class Saved(NamedTuple):
    """What a folder holds."""

    adaptation: Adaptation
    classes: NDArray[Any]


def is_saved(place: Place) -> bool:
    """Return whether a folder holds a classifier."""
    return exists(place / CARD)


def write_classifier(place: Place, adaptation: Adaptation, classes: NDArray[Any]) -> None:
    """Write a classifier as a folder, whole or not at all.

    Raises:
        UserError: the folder exists, labels are no texts or numbers, or the encoder is not
            raymaml's, so that the folder would not be enough.
    """
    trained, kind = adaptation.trained, classes.dtype.kind
    if kind not in "biufUO" or (kind == "O" and not all(isinstance(c, str) for c in classes)):
        raise UserError(
            f"save: the labels are of type {classes.dtype}", remedy="fit with texts or numbers"
        )
    if _has_code_of_ones_own(trained.config):
        raise UserError(
            f"save: model.encoder is {trained.config.model.encoder}, whose code a folder does not"
            " hold",
            remedy="keep the run, whose CONFIG names it",
        )
    learner, fast = trained.learner, adaptation.fast
    files = {
        THETA: weights_bytes(learner.params | learner.moments),
        ADAPTED: weights_bytes(fast.params | fast.buffers),
    }
    card = ClassifierCard(
        schema_version=1,
        classes=classes.tolist(),
        label_type="str" if kind == "U" else classes.dtype.name,
        shots=adaptation.shots,
        protocol=_protocol(adaptation),
        preprocessing=trained.preprocessing,
        train_classes=trained.train_classes,
        checkpoint=trained.checkpoint,
        origin=trained.origin,
        versions=versions(trained.config.model),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        config=without_places(trained.config.model_dump(mode="json", exclude=_PLACES)),
    )
    try:
        with new_folder(place, CARD) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"save: {place} exists", remedy="give another folder") from None


def _protocol(adaptation: Adaptation) -> str:
    config, shots = adaptation.trained.config, sorted(set(adaptation.shots))
    several = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else str(shots[0])
    steps = config.test_inner.num_steps
    return (
        f"{len(adaptation.shots)}-way {several}-shot | {config.model.norm_text} | {steps}"
        f" step{'' if steps == 1 else 's'} | head {config.model.head}"
    )


def read_classifier(place: Place, device: torch.device) -> Saved:
    """Read what ``write_classifier`` wrote.

    Raises:
        UserError: naming the file that is damaged or of another kind.
    """
    card = _card(place)
    config = _config(place, card)
    shape, rows = card.preprocessing.image_shape, config.episodes.test.num_ways
    if config.model.head == "learned" and rows != len(card.classes):
        raise _damaged(place, CARD, f"it has {len(card.classes)} classes, and the head {rows} rows")
    learner = build_learner(config, shape, rows, device)
    theta = _weights(place, card, THETA, learner.params | learner.moments, device)
    load_params(learner, theta)
    found = _weights(
        place, card, ADAPTED, _adapted_like(learner, config, len(card.classes)), device
    )
    buffers = dict(learner.model.named_buffers())
    fast = Fast(
        params={name: value for name, value in found.items() if name not in buffers},
        state={},
        buffers={name: found[name] for name in buffers},
        steps=config.test_inner.num_steps,
    )
    trained = TrainedModel(
        learner=learner,
        config=config,
        preprocessing=card.preprocessing,
        train_classes=card.train_classes,
        checkpoint=card.checkpoint,
        origin=card.origin,
        encoder_source=None,
    )
    return Saved(Adaptation(trained=trained, fast=fast, shots=card.shots), _classes(place, card))


def _card(place: Place) -> ClassifierCard:
    try:
        if (place / CARD).stat().st_size > _MOST_CARD_BYTES:
            raise ValueError("it is too long")
        card = checked(TypeAdapter(ClassifierCard), parse_json(read_bytes(place / CARD)))
        if len(card.shots) != len(card.classes) or card.files.keys() != {THETA, ADAPTED}:
            raise ValueError("its shots and files are not those of its classes")
    except (OSError, ValueError) as error:
        raise _damaged(place, CARD, reason_of(error)) from None
    return card


def _config(place: Place, card: ClassifierCard) -> Config:
    try:
        config = checked(TypeAdapter(Config), without_places(card.config))
    except ValueError as error:
        raise _damaged(place, CARD, reason_of(error)) from None
    if _has_code_of_ones_own(config):  # no code is imported because a folder says so
        raise _damaged(place, CARD, f"model.encoder is {config.model.encoder}")
    return config


def _has_code_of_ones_own(config: Config) -> bool:
    return config.model.encoder not in ENCODERS and config.model.library is None


def _classes(place: Place, card: ClassifierCard) -> NDArray[Any]:
    try:
        classes = np.array(card.classes, dtype=card.label_type)
        if classes.tolist() != card.classes or len(set(card.classes)) < len(card.classes):
            raise ValueError("they are not different labels of one type")
    except (ValueError, OverflowError) as error:
        raise _damaged(place, CARD, f"classes: {reason_of(error)}") from None
    return classes


def _adapted_like(learner: MetaLearner, config: Config, ways: int) -> Params:
    """Return tensors, without memory, of the names and shapes that adapted weights have."""
    found = dict(learner.model.named_parameters()) | dict(learner.model.named_buffers())
    shapes = {name: value.detach().to("meta") for name, value in found.items()}
    if config.model.head == "learned":
        return shapes
    return {
        name: value.new_empty(ways, *value.shape[1:]) if learner.head.holds(name) else value
        for name, value in shapes.items()
    }


def _weights(
    place: Place, card: ClassifierCard, name: str, wanted: Params, device: torch.device
) -> Params:
    try:
        content = read_bytes(place / name)
        if hashlib.sha256(content).hexdigest() != card.files[name]:  # type: ignore[index]
            raise ValueError(f"its sha256 is not the one in {CARD}")
        found = read_weights(content, device)
        if found.keys() != wanted.keys():
            raise ValueError("its tensors are not those of the model")
    except (OSError, ValueError) as error:
        raise _damaged(place, name, reason_of(error)) from None
    require_fitting(place / name, found, wanted)
    return found


def _damaged(place: Place, name: str, reason: str) -> UserError:
    return UserError(f"{place / name}: is damaged ({reason})", remedy="save the classifier again")
