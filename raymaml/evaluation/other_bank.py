"""A bank that is not the one of training: how many of its test classes has the model seen?"""

from __future__ import annotations

from dataclasses import dataclass

from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CARD, read_card
from raymaml.training.identity import read_run_file
from raymaml.training.trust import knows_no_bank

REMEDY = (
    "give the data.bank of training, or set evaluation.other_bank: true to judge on this one,"
    " which the report then says"
)


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


def other_bank(checkpoint: Place, bank: ImageBank) -> OtherBank | None:
    """Return which classes of ``bank`` the model has seen; None where it is the bank of training.

    The hash of a bank covers names, splits and images of all its classes. A class is one of
    training if it has the name, or the number of images and the first, middle and last image, of
    one. Weights that were converted know no bank.
    """
    card = read_card(checkpoint)
    if card.bank_hash == bank.hash or knows_no_bank(checkpoint, card):
        return None
    test = {bank.classes[i].name: bank.class_digest(i) for i in bank.class_ids("test").tolist()}
    run = read_run_file(checkpoint.parent)
    if run is None or run.classes is None:
        return OtherBank(num_classes=len(test), trained_on=None)
    seen = {
        split: {
            name
            for name, digest in test.items()
            if name in run.classes.get(split, {}) or digest in run.classes.get(split, {}).values()
        }
        for split in ("train", "val")
    }
    return OtherBank(
        num_classes=len(test),
        trained_on=len(seen["train"]),
        chosen_by=len(seen["val"] - seen["train"]),
    )


def require_bank(checkpoint: Place, bank: ImageBank, *, other_bank_asked: bool) -> None:
    """Check that the model was trained on ``bank``, or that the config allows another one.

    Raises:
        UserError: neither holds.
    """
    found = other_bank(checkpoint, bank)
    if found is not None and not other_bank_asked:
        raise UserError(
            f"{checkpoint / CARD}: bank_hash is {read_card(checkpoint).bank_hash[:12]}, that of"
            f" {bank.folder} is {bank.hash[:12]}: {found.text}",
            remedy=REMEDY,
        )
