"""A trained model, opened from its run folder alone: no bank and no episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.config.model import ENCODERS
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import HEADER_FILE
from raymaml.data.preprocessing import Preprocessing, preprocessing_of
from raymaml.meta.learner import MetaLearner
from raymaml.models.source import encoder_source
from raymaml.storage.files import exists
from raymaml.storage.place import Place, to_place
from raymaml.training.checkpoint import (
    CARD,
    CheckpointCard,
    find_checkpoint,
    load_weights,
    read_card,
)
from raymaml.training.data import open_bank
from raymaml.training.identity import read_run_file
from raymaml.training.origin import (
    knows_no_bank,
    require_of_its_run,
    require_same_model,
    trained_config,
)
from raymaml.training.state import build_learner


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with the weights of a checkpoint, and all that its use needs."""

    learner: MetaLearner
    config: Config
    """The given one; of a folder that of training, with stand-ins for source and places."""
    preprocessing: Preprocessing
    train_classes: tuple[str, ...]
    """Names; empty where the run does not know them."""
    checkpoint: str
    """Name of the checkpoint's folder."""
    origin: str
    """SHA-256 of the file of weights."""
    encoder_source: str | None
    """Of an encoder of one's own, as it was in training; see ``raymaml.models.source``."""


def open_trained(
    where: Config | Place | str,
    device: torch.device | str,
    which: Literal["best", "last"] | None = None,
) -> TrainedModel:
    """Open the model of a run.

    Args:
        where: a config, or the folder of a run or of a checkpoint.
        device: for the model.
        which: checkpoint; None: that of ``evaluation.checkpoint``, or the best one of a folder.

    Raises:
        UserError: there is no checkpoint; it is damaged, of another run, or does not fit the
            config; an ensemble or cosine similarity would answer instead of one adapted model; it
            is of a pretraining, and the head does not start at zero; a folder names an encoder that
            is neither raymaml's nor of a library, or that library is not installed; or an older
            checkpoint needs its bank for the moments, and that is not there.
    """
    path, device = _checkpoint(where, which), torch.device(device)
    require_of_its_run(path)
    card = read_card(path)
    config = where if isinstance(where, Config) else _config_of(path)
    if config.evaluation.head != "model":
        raise UserError(
            f"evaluation.head is {config.evaluation.head}, and a learner answers by the head of its"
            " model",
            remedy="give the CONFIG with evaluation.head=model; `raymaml test` judges by"
            f" {config.evaluation.head}",
        )
    if config.stage == "pretrain" and config.model.head != "zero":
        raise UserError(
            f"{path}: is of a pretraining, whose head knows the classes of training alone",
            remedy=f"give the run that starts from it (model.weights: {path.parent})",
        )
    channels, _, width = card.image_shape
    ways = config.episodes.test.num_ways
    require_same_model(path, config.model, ways, (channels, config.data.image_size, width))
    preprocessing, classes = _pictures(where, path, card)
    learner = build_learner(config, card.image_shape, ways, device)
    load_weights(learner, path, device)
    if card.encoder_source not in (None, encoder_source(config.model)):
        LOG.warning("model.encoder: its source was edited after training")
    return TrainedModel(
        learner=learner,
        config=config,
        preprocessing=preprocessing,
        train_classes=classes,
        checkpoint=path.name,
        origin=card.files[card.weights],
        encoder_source=card.encoder_source,
    )


def _checkpoint(where: Config | Place | str, which: Literal["best", "last"] | None) -> Place:
    if isinstance(where, Config):
        chosen = which or where.evaluation.checkpoint
        if chosen == "ensemble":
            raise UserError(
                "evaluation.checkpoint is ensemble, and a learner is one model",
                remedy="set evaluation.checkpoint=best; `raymaml test` judges the ensemble",
            )
        return find_checkpoint(where.run_folder, chosen)
    folder = to_place(where)
    return folder if exists(folder / CARD) else find_checkpoint(folder, which or "best")


def _config_of(path: Place) -> Config:
    """Return the config that a folder holds; it may have been written by anybody.

    timm and torchvision are libraries, of which it names a network: no code of the folder runs.
    """
    config = trained_config(path)
    if config.model.encoder not in ENCODERS and config.model.library is None:
        raise UserError(
            f"{path / CARD}: model.encoder is {config.model.encoder}, and code is not imported"
            " because a folder says so",
            remedy="give the CONFIG of the run, not its folder",
        )
    return config


def _pictures(
    where: Config | Place | str, path: Place, card: CheckpointCard
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing and the classes of training; for older cards, by config and bank."""
    if card.preprocessing is not None:
        return card.preprocessing, card.train_classes
    bank, found = None, None
    if isinstance(where, Config):
        bank = _bank(where, path, card)
        found = preprocessing_of(where.data, card.image_shape, bank)
    if found is None:
        raise UserError(
            f"{path / CARD}: an earlier raymaml wrote it, without the moments of the images",
            remedy="give the CONFIG of the run with its data.bank in place"
            " (`raymaml data import CONFIG` makes it again)",
        )
    run = read_run_file(path.parent)
    if run is not None and run.classes is not None:
        return found, tuple(run.classes.get("train", {}))
    return found, () if bank is None else bank.class_names("train")


def _bank(config: Config, path: Place, card: CheckpointCard) -> ImageBank | None:
    """Return the bank of training; None where it is away."""
    if not exists(config.data.bank / HEADER_FILE):
        return None
    bank = open_bank(config.data)
    if bank.hash != card.bank_hash and not knows_no_bank(path, card):
        raise UserError(
            f"{path / CARD}: bank_hash is {card.bank_hash[:12]}, that of {bank.folder} is"
            f" {bank.hash[:12]}, and its moments are needed",
            remedy="give the data.bank of training",
        )
    return bank
