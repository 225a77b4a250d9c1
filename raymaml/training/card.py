"""The card of a checkpoint: what it says, and whether that fits its folder and its run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import checked, parse_json, shortened
from raymaml.config.base import Count
from raymaml.config.load import check_config
from raymaml.config.schema import Config
from raymaml.data.bank_format import ImageShape
from raymaml.storage.files import exists, reaching, read_bytes
from raymaml.storage.place import Place, is_remote
from raymaml.training import identity as run_schema
from raymaml.training.identity import (
    IDENTITY,
    Identity,
    as_meant,
    deciding,
    differences,
    judging,
    read_identity,
)
from raymaml.training.state import Validation

SCHEMA_VERSION = 2
_READABLE = (1, 2)
CARD = "checkpoint.json"
CheckpointFile = Literal["params.pt", "optimizer.pt"]
_NAME = re.compile(r"checkpoint_(\d{8,})")


class CheckpointCard(BaseModel):
    """The readable part of a checkpoint."""

    # JSON knows no infinity; a card of an earlier version may hold one as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    step: Count
    validation: Validation | None
    best: Validation | None
    files: dict[CheckpointFile, Annotated[str, Field(min_length=64)]]
    """sha256 by file name; no other file can be named, least of all a path."""
    image_shape: ImageShape
    bank_hash: str
    encoder_source: str | None = None
    """Of an encoder of one's own, see ``raymaml.models.source``."""
    versions: dict[str, str]
    config: dict[str, Any]

    def as_text(self) -> str:
        """Return what the file holds."""
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


def find_checkpoint(folder: Place, which: Literal["best", "last"]) -> Place:
    """Return the newest checkpoint of a run, or the one with the best validation accuracy.

    Raises:
        UserError: there is none, or the best one is not what the newest says.
    """
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"{folder}: holds no checkpoint", remedy="run `raymaml train CONFIG` first")
    last = checkpoint_path(folder, steps[-1])
    return last if which == "last" else _best(last)


def _best(last: Place) -> Place:
    """Return the best checkpoint of the run whose newest is ``last``.

    Raises:
        UserError: it is not there, or was judged otherwise than ``last`` says.
    """
    best = read_card(last).best
    if best is None:
        return last
    path = checkpoint_path(last.parent, best.step)
    if not exists(path):
        raise UserError(
            f"{last / CARD}: best.step is {best.step}, but {path} is not there",
            remedy=f"restore it from a copy, or judge {last.name} by evaluation.checkpoint=last",
        )
    if (found := read_card(path).validation) != best:
        raise UserError(
            f"{path / CARD}: validation is {found}, but best of {last / CARD} is {best}",
            remedy=f"{_remedy(last)}",
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
                f" {' and '.join(map(str, _READABLE))}",
                remedy="use the raymaml that wrote it",
            )
        content.pop("inherited_from", None)  # earlier versions had population-based training
        card = checked(_CARD, content)
        if "params.pt" not in card.files:
            raise ValueError("it names no params.pt")
    except (OSError, ValueError) as error:
        raise damaged(path, CARD, reason_of(error)) from None
    match = _NAME.fullmatch(path.name)
    if problems := _contradictions(card, int(match[1]) if match else None):
        raise UserError(*(f"{path / CARD}: {each}" for each in problems), remedy=_remedy(path))
    return card


def _contradictions(card: CheckpointCard, number: int | None) -> list[str]:
    """Say in what a card disagrees with the ``number`` in its folder's name, and with itself.

    A run may stop between two validations, so that the newest one is of an earlier step.
    """
    problems = []
    if number is not None and number != card.step:
        problems.append(f"step is {card.step}, the folder's name says {number}")
    last, best = card.validation, card.best
    if last is None or best is None:
        for name, value, other in (("best", best, last), ("validation", last, best)):
            if value is None and other is not None:
                rest = "validation" if name == "best" else "best"
                problems.append(f"{name} is absent, {rest} is of step {other.step}")
        return problems
    if last.step > card.step:
        problems.append(f"validation.step is {last.step}, step is {card.step}")
    if best.step > last.step:
        problems.append(f"best.step is {best.step}, validation.step is {last.step}")
    elif best.accuracy < last.accuracy:
        problems.append(f"best.accuracy is {best.accuracy}, validation.accuracy is {last.accuracy}")
    elif best.step == last.step and best != last:
        problems.append(f"best and validation differ, both of step {best.step}")
    return problems


def require_of_run(last: Place, identity: Identity) -> None:
    """Check that the newest checkpoint of a run, and the best one, are of this run.

    Raises:
        UserError: naming everything in which either differs.
    """
    config, wanted, whose = identity.config, identity.of_cards(), "the config and its bank say"
    require_agreement(last, config, wanted, whose)
    best = _best(last)  # which another run's checkpoint may not have
    if best != last:
        require_agreement(best, config, wanted, whose)
    if read_card(last).step < config.outer.num_steps:
        for path in dict.fromkeys((last, best)):
            _require_same_validation(path, config)


def _require_same_validation(path: Place, config: Config) -> None:
    """Check that a checkpoint was judged as ``config`` judges: a run has one best of all.

    Raises:
        UserError: naming everything that differs.
    """
    card = read_card(path)
    if card.validation is None:
        return
    before, now = judging(_config_of(path, card, config)), judging(config)
    problems = [
        f"{path / CARD}: was validated with {key} = {before[key]!r}, the config now says"
        f" {value!r}, and the best of both would not be one of either; give the old value to go"
        " on, and give the new one to `raymaml test` alone, or choose another name"
        for key, value in now.items()
        if before[key] != value
    ]
    if problems:
        raise UserError(*problems)


def require_agreement(path: Place, own: Config, wanted: Mapping[str, Any], whose: str) -> None:
    """Check that what a checkpoint says of how it came about is what is ``wanted``, by key.

    Args:
        path: of the checkpoint.
        own: the config at hand, see ``trained_config``.
        wanted: the keys to compare.
        whose: the beginning of a sentence that a value of ``wanted`` ends.

    Raises:
        UserError: naming everything that differs.
    """
    card = read_card(path)
    others = {key: getattr(card, key) for key in ("image_shape", "bank_hash", "encoder_source")}
    says = deciding(_config_of(path, card, own)) | {
        key: value for key, value in others.items() if key in wanted
    }
    problems = [
        f"{path / CARD}: {key} is {shortened(has)}, {whose} {shortened(should)}"
        for key, (has, should) in _strange(path, card, says, wanted).items()
    ]
    problems += _not_measured(path, card)
    if problems:
        raise UserError(*problems, remedy=_remedy(path))


def _not_measured(path: Place, card: CheckpointCard) -> Iterator[str]:
    """Say which validation of a card is not what ``metrics.jsonl`` has for its step, if any."""
    from raymaml.training.metrics import METRICS_FILE, read_metrics  # loads tensorboardX

    rows = read_metrics(path.parent / METRICS_FILE)
    for name, found in (("validation", card.validation), ("best", card.best)):
        step = None if found is None else found.step
        measured = [row["val_accuracy"] for row in rows if row["step"] == step and _judged(row)]
        if found is not None and measured and found.accuracy not in measured:
            yield (
                f"{path / CARD}: {name}.accuracy is {found.accuracy}, {METRICS_FILE} says"
                f" {measured[-1]} of step {step}"
            )


def _judged(row: Mapping[str, Any]) -> bool:
    return row.get("val_accuracy") is not None


def _strange(
    path: Place, card: CheckpointCard, says: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return what differs from what is ``wanted``: by key, what the card says and what it should.

    Converted weights know no bank, and lie in no run. A run of the first schema does not know its
    source.
    """
    converted = knows_no_bank(path, card)
    sourceless = schema_of_run(path.parent) == 1
    return {
        key: (has, should)
        for key, (should, has) in differences(wanted, says).items()
        if not (key == "encoder_source" and sourceless) and not (key == "bank_hash" and converted)
    }


def knows_no_bank(path: Place, card: CheckpointCard) -> bool:
    """Tell whether the weights of a checkpoint were converted: its run, if any, has no bank."""
    if card.bank_hash != "":
        return False
    run = path.parent / IDENTITY
    return not exists(run) or read_identity(run)[1].get("bank_hash") == ""


def schema_of_run(folder: Place) -> int | None:
    """Return the schema version of a run: of ``run.json``, without one of the newest card.

    None where there is neither, or the card is of converted weights, which saw no images.
    """
    if exists(folder / IDENTITY):
        return read_identity(folder / IDENTITY)[0]
    steps = list_steps(folder)
    card = read_card(checkpoint_path(folder, steps[-1])) if steps else None
    return None if card is None or card.bank_hash == "" else card.schema_version


def require_of_today(folder: Place, num_steps: int, *, though_done: bool = False) -> None:
    """Check that no earlier raymaml started the run, unless it is done: the order was another.

    Args:
        folder: of the run.
        num_steps: number of its outer steps.
        though_done: whether a run that is done is refused too.

    Raises:
        UserError: an earlier raymaml started it.
    """
    done = max(list_steps(folder), default=-1) >= num_steps
    if (done and not though_done) or schema_of_run(folder) in (None, run_schema.SCHEMA_VERSION):
        return
    remedy = "" if done else "finish it with that version, or "
    raise UserError(
        f"{folder}: was started by an earlier raymaml, whose images stood in another order",
        remedy=f"{remedy}choose another name; `raymaml test` judges what it has",
    )


def trained_config(path: Place, own: Config) -> Config:
    """Return the config that a checkpoint was written with, but for source and places.

    Those are of ``own``: nothing is opened, imported or reached since a file says so, and a URI is
    enough for fsspec to do that.

    Raises:
        UserError: the checkpoint is damaged.
    """
    return _config_of(path, read_card(path), own)


def _config_of(path: Place, card: CheckpointCard, own: Config) -> Config:
    tree = as_meant(card.config)
    data = tree.get("data")
    if isinstance(data, Mapping):
        kept = {key: getattr(own.data, key) for key in ("source", "bank", "shards", "cache")}
        data = {**data, **kept}
    return check_config({**tree, "run_dir": own.run_dir, "data": data}, str(path / CARD))


def damaged(path: Place, name: str, reason: str) -> UserError:
    """Return what to say of a file of the checkpoint ``path`` that cannot be used."""
    return UserError(f"{path / name}: is damaged ({reason})", remedy=f"{_remedy(path)}")


def _remedy(path: Place) -> str:
    return f"move {path} away to go on from the checkpoint before it, or restore it from a copy"
