"""The origin that a checkpoint claims, compared with its run and with the config."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from raymaml.common.errors import UserError, gathered
from raymaml.config.explain import validated
from raymaml.config.schema import Config
from raymaml.models.source import source_files
from raymaml.storage.place import Place
from raymaml.training.checkpoint import (
    CARD,
    CheckpointCard,
    best_checkpoint,
    checkpoint_path,
    find_checkpoint,
    list_steps,
    move_away,
    read_card,
    saved_step,
)
from raymaml.training.identity import (
    IDENTITY,
    SCHEMA_VERSION,
    Identity,
    as_meant,
    deciding,
    flat,
    judging,
    read_run_file,
    require_equal,
)

_STARTED = "was started with {key} = {had}, the config now says {has}"
_TO_RESUME = "give the old value to resume, or another name to start again"
_REMEDIES = {
    "bank_hash": "import the old images again, or choose another name",
    "train_manifest": "put the old episodes back, or choose another name",
}


def require_same_start(folder: Place, identity: Identity) -> None:
    """Check that the ``run.json`` of a run, if there is one, says what its identity is now.

    Raises:
        UserError: naming everything that differs, or that an encoder of one's own was edited: the
            weights would be those of neither version.
    """
    if (found := read_run_file(folder)) is None:
        return
    model, before = identity.config.model, found.facts
    same_encoder = before.get("model.encoder") == model.encoder
    if same_encoder and before["encoder_source"] not in (None, identity.encoder_source):
        files = ", ".join(map(str, source_files(model).values()))
        raise UserError(
            f"{folder}: the source of model.encoder {model.encoder} was edited after the run was"
            f" started ({files})",
            remedy="put it back as it was to go on, or choose another name",
        )
    ignored = {"encoder_source"}
    if found.version == 1:  # its episodes cannot be sampled again, and it is done
        ignored.add("train_manifest")
    now = flat(identity.of_run())
    require_equal(folder, before, now, _STARTED, _TO_RESUME, remedies=_REMEDIES, ignored=ignored)


def require_trained_by(config: Config) -> None:
    """Check that the run was trained by what ``config`` says of learning.

    Raises:
        UserError: there is no run, or it was not.
    """
    trained = trained_config(find_checkpoint(config.run_folder, "last"), config)
    require_equal(config.run_folder, deciding(trained), deciding(config), _STARTED, _TO_RESUME)


def require_of_run(last: Place, identity: Identity) -> None:
    """Check that the newest checkpoint of a run, and the best one, are of this run.

    Raises:
        UserError: naming everything in which either differs.
    """
    config, wanted, whose = identity.config, identity.of_cards(), "the config and its bank say"
    _require_agreement(last, config, wanted, whose)
    best = best_checkpoint(last)  # which another run's checkpoint may not have
    if best != last:
        _require_agreement(best, config, wanted, whose)
    if read_card(last).step < config.outer.num_steps:
        for path in dict.fromkeys((last, best)):
            _require_same_validation(path, config)


def require_of_its_run(path: Place, config: Config) -> None:
    """Check that a checkpoint says what the ``run.json`` beside it says, if there is one.

    Raises:
        UserError: naming everything that differs.
    """
    if (found := read_run_file(path.parent)) is not None:
        unsaid = {"train_manifest"}  # by checkpoints
        if not found.facts["encoder_source"]:
            unsaid.add("encoder_source")
        _require_agreement(path, config, found.facts, f"{IDENTITY} says", unsaid)


def _require_agreement(
    path: Place,
    own: Config,
    wanted: Mapping[str, Any],
    whose: str,
    ignored: Collection[str] = (),
) -> None:
    """Check that a checkpoint says what is ``wanted``, by dotted key; ``whose`` names the source.

    Converted weights know no bank, and a run of the first schema does not know its source.
    """
    card, unknown = read_card(path), set(ignored)
    if knows_no_bank(path, card):
        unknown.add("bank_hash")
    if _schema_of_run(path.parent) == 1:
        unknown.add("encoder_source")
    others = {key: getattr(card, key) for key in ("image_shape", "bank_hash", "encoder_source")}
    says = deciding(trained_config(path, own)) | {
        key: value for key, value in others.items() if key in wanted
    }
    sentence = "{key} is {has}, " + whose + " {had}"
    with gathered() as mistakes:
        with mistakes.kept():
            require_equal(path / CARD, wanted, says, sentence, move_away(path), ignored=unknown)
        for problem in _not_measured(path, card):
            mistakes.add(f"{path / CARD}: {problem}", move_away(path))


def _not_measured(path: Place, card: CheckpointCard) -> Iterator[str]:
    """Yield each validation of a card that differs from ``metrics.jsonl`` at its step."""
    from raymaml.training.metrics import METRICS_FILE, read_metrics  # loads tensorboardX

    measured: dict[int, list[float]] = {}
    for row in read_metrics(path.parent / METRICS_FILE):
        if row.get("val_accuracy") is not None:
            measured.setdefault(row["step"], []).append(row["val_accuracy"])
    for name, found in (("validation", card.validation), ("best", card.best)):
        if found and found.accuracy not in measured.get(found.step, [found.accuracy]):
            yield (
                f"{name}.accuracy is {found.accuracy}, {METRICS_FILE} says"
                f" {measured[found.step][-1]} of step {found.step}"
            )


def _require_same_validation(path: Place, config: Config) -> None:
    """Check that a checkpoint was judged as ``config`` judges: a run has one best of all."""
    if read_card(path).validation is not None:
        require_equal(
            path / CARD,
            judging(trained_config(path, config)),
            judging(config),
            "was validated with {key} = {had}, the config now says {has}, and the best of both"
            " would not be one of either",
            "give the old value to go on, and give the new one to `raymaml test` alone, or choose"
            " another name",
        )


def require_same_model(path: Place, config: Config, image_shape: tuple[int, int, int]) -> None:
    """Check that the weights of a checkpoint fit the model that ``config`` and images ask for.

    Raises:
        UserError: naming everything that differs.
    """
    trained = trained_config(path, config)
    before, now = (
        flat({"model": each.model_dump(mode="json")["model"]}) for each in (trained, config)
    )
    shape = "the image shape (C, H, W)"
    before[shape], now[shape] = read_card(path).image_shape, image_shape
    if config.model.head == "learned":
        before["num_ways"] = trained.episodes.train.num_ways
        now["num_ways"] = config.episodes.test.num_ways
    require_equal(
        path,
        before,
        now,
        "was trained with {key} = {had}, config and bank now say {has}",
        "give the old value, or train under another name",
    )


def knows_no_bank(path: Place, card: CheckpointCard) -> bool:
    """Return whether the weights of a checkpoint were converted: its run, if any, has no bank."""
    if card.bank_hash != "":
        return False
    run = read_run_file(path.parent)
    return run is None or run.facts.get("bank_hash") == ""


def _schema_of_run(folder: Place) -> int | None:
    """Return the schema version of a run: of ``run.json``, without one of the newest card.

    None where there is neither, or the card is of converted weights, which saw no images.
    """
    if (found := read_run_file(folder)) is not None:
        return found.version
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
    done = saved_step(folder) >= num_steps
    if (done and not though_done) or _schema_of_run(folder) in (None, SCHEMA_VERSION):
        return
    remedy = "" if done else "finish it with that version, or "
    raise UserError(
        f"{folder}: was started by an earlier raymaml, whose images stood in another order",
        remedy=f"{remedy}choose another name; `raymaml test` judges what it has",
    )


def trained_config(path: Place, own: Config) -> Config:
    """Return the config that a checkpoint was written with, but for source and places.

    Those are of ``own``: nothing is opened, imported or reached because a file says so, and a URI
    is enough for fsspec to do that.

    Raises:
        UserError: the checkpoint is damaged.
    """
    tree = as_meant(read_card(path).config)
    data = tree.get("data")
    if isinstance(data, Mapping):
        kept = {key: getattr(own.data, key) for key in ("source", "bank", "shards", "cache")}
        data = {**data, **kept}
    return validated(Config, {**tree, "run_dir": own.run_dir, "data": data}, str(path / CARD))
