"""The results of a finished campaign as a report shows them, with the conditions of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from raymaml.common.errors import UserError
from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ImageBank
from raymaml.evaluation.examination import Examination
from raymaml.statistics.confidence_sequence import Stopping
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CARD, read_card
from raymaml.training.identity import read_run_file
from raymaml.training.origin import knows_no_bank

OTHER_BANK_REMEDY = (
    "give the data.bank of training, or set evaluation.other_bank: true to judge on this one,"
    " which the report then says"
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions of an accuracy, beside the weights."""

    spec: EpisodesConfig
    """Shape of the episodes."""
    model: ModelConfig
    """Norm and head."""
    head: Literal["model", "cosine"] = "model"
    """``evaluation.head``: that of the model, or cosine similarity."""
    num_steps: int
    """Inner steps."""
    members: int = 1
    """Checkpoints whose logits are averaged."""
    examination: Examination | None
    """Of the model; None: it was not examined."""
    remarks: Sequence[str] = ()
    """Such as: the bank is not the one of training, or the encoder was edited."""

    @property
    def caution(self) -> str:
        """The warning of the examination; empty: there is none."""
        if self.examination is None:
            return "caution: not examined whether its logits follow their images"
        return self.examination.caution

    @property
    def norm(self) -> str:
        """Whether the arm is inductive, and its norm.

        An encoder of raymaml is inductive by its norm, as tests prove, unless the examination says
        otherwise. Any other encoder is inductive only where that was measured.
        """
        model, found = self.model, self.examination
        if model.norm == "transductive":
            return "transductive"
        if model.is_transductive:
            return f"transductive ({model.norm_text})"
        measured = None if found is None else found.is_inductive
        if model.encoder in ENCODERS and measured is not False:
            return f"inductive ({model.norm_text})"
        if found is None or measured is None:
            return f"not known to be inductive ({model.norm_text})"
        kind = "inductive" if measured else "transductive"
        return f"{kind}, measured on {found.episodes} episodes ({model.norm_text})"

    @property
    def is_transductive(self) -> bool:
        """Whether a prediction depends on the other queries."""
        return self.norm.startswith("transductive")

    @property
    def starts_equal(self) -> bool:
        """Whether the head gives all classes equal logits before the first inner step."""
        return self.head == "model" and self.model.head in ("zero", "shared")

    def __str__(self) -> str:
        """Return one line: ``5-way 1-shot 15-query | transductive | 1 step | head zero | ...``."""
        spec = self.spec
        parts = (
            f"{spec.num_ways}-way {spec.num_shots}-shot {spec.num_queries}-query",
            self.norm,
            f"{self.num_steps} step" + "s" * (self.num_steps != 1),
            f"head {self.model.head if self.head == 'model' else self.head}",
            "single model" if self.members == 1 else f"ensemble of {self.members} checkpoints",
            self.caution,
        )
        return " | ".join([*filter(None, parts), *self.remarks])


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The records of one arm of a campaign."""

    name: str
    description: str
    """Of the arm, one sentence."""
    protocol: Protocol
    records: pa.Table
    """As ``record_files.read_records`` returns them."""
    identity: Mapping[str, Any]
    """The values that decide the records: weights, model, episodes, versions, ..."""
    stopping: Stopping | None = None
    """The rule that may have ended judging early; None: there was none."""
    circumstances: Sequence[Mapping[str, str]] = ()
    """Of the chunks, as ``record_files.read_circumstances`` returns them: hardware, hashes, ..."""


@dataclass(frozen=True, kw_only=True)
class OtherBank:
    """A bank that is not that of training."""

    num_classes: int
    """Number of its test classes."""
    trained_on: int | None
    """Number of them that were trained on; None where the run does not name its classes."""
    chosen_by: int = 0
    """Number of further ones that chose the best checkpoint."""

    @property
    def text(self) -> str:
        """The remark in reports."""
        if self.trained_on is None:
            return "another bank than in training, whose classes are not known"
        seen = f"trained on {self.trained_on} of its {self.num_classes} test classes"
        chosen = f", and chosen by {self.chosen_by}" if self.chosen_by else ""
        return f"another bank than in training, {seen}{chosen}"


def leak_remarks(bank: ImageBank) -> list[str]:
    """Return the caution where test images are in train or val too; see ``data/duplicates.py``."""
    leaks = bank.duplicates.leaks if bank.duplicates else ()
    counts = [(each.equal + each.near, each.other) for each in leaks if each.split == "test"]
    places = ", ".join(f"{count:,} in {split}" for count, split in counts)
    return [f"caution: test images are in other splits as well ({places})"] if counts else []


def other_bank(checkpoint: Place, bank: ImageBank, *, asked: bool) -> OtherBank | None:
    """Return which classes of ``bank`` the model has seen; None where it is the bank of training.

    The hash of a bank covers names, splits and images of all its classes. A class is one of
    training if it has the name, or the number of images and the first, middle and last image, of
    one. Weights that were converted know no bank.

    Raises:
        UserError: it is another bank, and none was asked for.
    """
    card = read_card(checkpoint)
    if card.bank_hash == bank.hash or knows_no_bank(checkpoint, card):
        return None
    test = {bank.classes[i].name: bank.class_digest(i) for i in bank.class_ids("test").tolist()}
    run = read_run_file(checkpoint.parent)
    if run is None or run.classes is None:
        found = OtherBank(num_classes=len(test), trained_on=None)
    else:
        trained_on, chosen_by = (
            {name for name, digest in test.items() if name in classes or digest in classes.values()}
            for classes in (run.classes.get(split, {}) for split in ("train", "val"))
        )
        found = OtherBank(
            num_classes=len(test),
            trained_on=len(trained_on),
            chosen_by=len(chosen_by - trained_on),
        )
    if not asked:
        raise UserError(
            f"{checkpoint / CARD}: bank_hash is {card.bank_hash[:12]}, that of {bank.folder} is"
            f" {bank.hash[:12]}: {found.text}",
            remedy=OTHER_BANK_REMEDY,
        )
    return found
