"""The origin that a checkpoint claims, compared with its run and with the config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from raymaml.common.errors import UserError, gathered
from raymaml.config.explain import validated
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config
from raymaml.data.bank_format import ImageShape
from raymaml.models.source import rule_files, source_files
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
)
from raymaml.training.identity import (
    IDENTITY,
    RANDOM_ORDER,
    Identity,
    as_meant,
    flat,
    pictures,
    read_run_file,
    require_equal,
    unsaid_on_pictures,
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
        UserError: naming everything that differs, or that an encoder or a rule of one's own was
            edited: the weights would be those of neither version.
    """
    if (found := read_run_file(folder)) is None:
        return
    config, before = identity.config, found.facts
    model, inner = config.model, config.inner
    own: dict[str, tuple[str, str, Callable[[], dict[str, Path]]]] = {
        "encoder_source": ("model.encoder", model.encoder, partial(source_files, model)),
        "rule_source": ("inner.rule", inner.rule, partial(rule_files, inner)),
    }
    for source, (key, name, paths) in own.items():
        had = before.get(source)
        if before.get(key) == name and had not in (None, getattr(identity, source)):
            files = ", ".join(map(str, paths().values()))
            raise UserError(
                f"{folder}: the source of {key} {name} was edited after the run was started"
                f" ({files})",
                remedy="put it back as it was to go on, or choose another name",
            )
    now = identity.facts()
    unsaid = {"encoder_source", "rule_source", "image_shape"} | unsaid_on_pictures(before, now)
    require_equal(folder, before, now, _STARTED, _TO_RESUME, remedies=_REMEDIES, ignored=unsaid)


def require_trained_by(folder: Place, learning: Mapping[str, Any]) -> None:
    """Check that a run was trained by these keys, ``Config.learning``.

    Raises:
        UserError: there is no run, or it was not.
    """
    trained = trained_config(find_checkpoint(folder, "last")).learning
    require_equal(folder, flat(trained), flat(learning), _STARTED, _TO_RESUME)


def require_of_run(last: Place, identity: Identity) -> None:
    """Check that training may go on from a run's newest checkpoint, and that the best is its own.

    Raises:
        UserError: naming everything in which either differs.
    """
    config = identity.config
    require_of_its_run(last, identity)
    best = best_checkpoint(last)  # which another run's checkpoint may not have
    if best != last:
        require_of_its_run(best, identity)
    if read_card(last).step >= config.steps.num_steps:
        return
    for path in dict.fromkeys((last, best)):
        if read_card(path).validation is not None:
            require_equal(
                path / CARD,
                flat(trained_config(path).validating),
                flat(config.validating),
                "was validated with {key} = {had}, the config now says {has}, and the best of both"
                " would not be one of either",
                "give the old value to go on, and give the new one to `raymaml test` alone, or"
                " choose another name",
            )


def require_of_its_run(path: Place, now: Identity | None = None) -> None:
    """Check that a checkpoint says what its run says: ``run.json``, if there is one.

    With the identity that the run has ``now``, check that it says that.

    Raises:
        UserError: naming everything that differs.
    """
    card, run = read_card(path), read_run_file(path.parent)
    unsaid = {"train_manifest", "weights_hash", "rule_source"}  # by checkpoints
    if now is not None:
        wanted, whose = now.facts(), "the config and its bank say"
    elif run is not None:
        wanted, whose = run.facts, f"{IDENTITY} says"
        unsaid |= {"image_shape"} | (set() if wanted["encoder_source"] else {"encoder_source"})
    else:
        return
    if knows_no_bank(path, card):
        unsaid.add("bank_hash")
    says = {
        **flat(trained_config(path).learning),
        **card.model_dump(include={"image_shape", "bank_hash", "encoder_source"}),
        **flat(pictures(card.preprocessing)),
    }
    unsaid |= unsaid_on_pictures(wanted, says)
    sentence = "{key} is {has}, " + whose + " {had}"
    with gathered() as mistakes:
        with mistakes.kept():
            require_equal(path / CARD, wanted, says, sentence, move_away(path), ignored=unsaid)
        for problem in _not_measured(path, card):
            mistakes.add(f"{path / CARD}: {problem}", move_away(path))
        known = run.classes.get("train", {}).keys() if run and run.classes else set()
        if known and card.train_classes and known != set(card.train_classes):
            problem = f"{path / CARD}: train_classes are not those of {IDENTITY}"
            mistakes.add(problem, move_away(path))


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


def require_same_model(
    path: Place, model: ModelConfig, num_ways: int, image_shape: ImageShape
) -> None:
    """Check that the weights of a checkpoint fit a model, its ways and its images.

    Raises:
        UserError: naming everything that differs.
    """
    trained, shape = trained_config(path), "the image shape (C, H, W)"
    before = flat(trained.model.model_dump(mode="json"), "model.")
    now = flat(model.model_dump(mode="json"), "model.")
    before[shape], now[shape] = read_card(path).image_shape, image_shape
    if model.head == "learned":
        before["num_ways"], now["num_ways"] = trained.episodes.train.num_ways, num_ways
    sentence = "was trained with {key} = {had}, config and bank now say {has}"
    remedy = "give the old value, or train under another name"
    require_equal(path, before, now, sentence, remedy, ignored={"model.weights"})


def knows_no_bank(path: Place, card: CheckpointCard) -> bool:
    """Return whether the weights of a checkpoint were converted: its run, if any, has no bank."""
    run = read_run_file(path.parent)
    return card.bank_hash == "" and (run is None or run.facts.get("bank_hash") == "")


def require_of_today(folder: Place) -> None:
    """Check that no earlier raymaml started the run, if there is one: the order was another.

    ``run.json`` names its version; without it, that is the version of the newest card, unless this
    is of converted weights, which saw no images.

    Raises:
        UserError: an earlier raymaml started it.
    """
    if (found := read_run_file(folder)) is not None:
        version = found.version
    else:
        cards = (read_card(checkpoint_path(folder, step)) for step in list_steps(folder)[-1:])
        version = next((card.schema_version for card in cards if card.bank_hash), RANDOM_ORDER)
    if version < RANDOM_ORDER:
        raise UserError(
            f"{folder}: was started by an earlier raymaml, whose images stood in another order",
            remedy="choose another name, or finish it with that version; `raymaml test` judges what"
            " it has",
        )


def trained_config(path: Place) -> Config:
    """Return the config that a checkpoint was written with, but for source and places.

    Stand-ins take their place: nothing is opened, imported or reached because a file says so, and a
    URI is enough for fsspec to do that.

    Raises:
        UserError: the checkpoint is damaged.
    """
    tree = without_places(as_meant(read_card(path).config))
    return validated(Config, tree, str(path / CARD))


def without_places(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a config with stand-ins for source and places."""
    data = tree.get("data")
    if isinstance(data, Mapping):
        data = {**data, "source": {"kind": "glyphs"}, "bank": "bank", "shards": "shards"}
        data.pop("cache", None)
    return {**tree, "run_dir": "runs", "data": data}
