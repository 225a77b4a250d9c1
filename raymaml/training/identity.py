"""The identity of a run: all that decides its weights, by dotted key, in files of all versions.

``run.json`` and the cards of checkpoints carry it. A key that such a file does not know did not
exist when it was written: it stands for its default of then, which is the default of now, or what
``as_meant`` says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined, to_jsonable_python

from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import checked, parse_json, shortened
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import ImageShape
from raymaml.data.preprocessing import Preprocessing, preprocessing_of
from raymaml.models.source import encoder_source, rule_source
from raymaml.storage.files import exists, read_bytes
from raymaml.storage.place import Place

IDENTITY = "run.json"
SCHEMA_VERSION = 3
"""2: the images of an episode stand in random order, and the key is there; 3: preprocessing."""
RANDOM_ORDER = 2
ABSENT = "absent"
_VALUES = {
    *("data.normalize", "model.norm", "model.encoder_args"),
    *("inner.rule_args", "inner.multi_step_loss"),
}
"""Mappings that are values, not sections."""
Classes = dict[str, dict[str, str]]
"""Digests of classes, by split and name."""
_CLASSES = TypeAdapter(Classes | None)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that decides the weights of a run; ``run.json`` and its checkpoints hold it."""

    config: Config
    image_shape: ImageShape
    bank_hash: str
    train_manifest: str
    """Hash of the training episodes; empty for converted weights, which saw none."""
    encoder_source: str | None
    """Of an encoder of one's own, as this process has imported it."""
    rule_source: str | None = None
    """The same of an inner rule of one's own."""
    preprocessing: Preprocessing | None
    """None for converted weights whose moments are unknown."""
    train_classes: tuple[str, ...]
    """Empty for converted weights."""
    weights_hash: str | None = None
    """Of the ``model.weights`` that the run starts from."""

    def of_run(self) -> dict[str, Any]:
        """Return what ``run.json`` says of learning, in sections as the config."""
        return {
            **self.config.learning,
            "bank_hash": self.bank_hash,
            "train_manifest": self.train_manifest,
            "encoder_source": self.encoder_source,
            **({} if self.rule_source is None else {"rule_source": self.rule_source}),
            **pictures(self.preprocessing),
            "weights_hash": self.weights_hash,
        }

    def facts(self) -> dict[str, Any]:
        """Return everything by dotted key, for ``require_equal``."""
        return {**flat(self.of_run()), "image_shape": self.image_shape}


def pictures(preprocessing: Preprocessing | None) -> dict[str, Any]:
    """Return the section of an identity on pictures, but for the limit on their size; empty: it is
    not known."""
    if preprocessing is None:
        return {}
    return {"preprocessing": preprocessing.model_dump(mode="json", exclude={"max_pixels"})}


def identity_of(
    config: Config,
    image_shape: ImageShape,
    bank_hash: str,
    train_manifest: str = "",
    bank: ImageBank | None = None,
    *,
    weights_hash: str | None = None,
) -> Identity:
    """Return the identity of the run of ``config``, reading the source of encoder and
    rule."""
    return Identity(
        config=config,
        image_shape=image_shape,
        bank_hash=bank_hash,
        train_manifest=train_manifest,
        encoder_source=encoder_source(config.model),
        rule_source=rule_source(config.inner),
        preprocessing=preprocessing_of(config.data, image_shape, bank),
        train_classes=() if bank is None else bank.class_names("train"),
        weights_hash=weights_hash,
    )


class RunFile(NamedTuple):
    """The content of a ``run.json``."""

    version: int
    facts: dict[str, Any]
    """Those of ``Identity.facts`` that the file knows."""
    classes: Classes | None
    """Those that the run learned from; None in older versions, or where the bank was away."""


def read_run_file(folder: Place) -> RunFile | None:
    """Return the content of the ``run.json`` of a run; None where there is none.

    Raises:
        UserError: it is damaged, or of a later version.
    """
    path = folder / IDENTITY
    if not exists(path):
        return None
    try:
        tree = parse_json(read_bytes(path))
        if not isinstance(tree, dict):
            raise ValueError("it holds no keys")
        version = tree.pop("schema_version", 1)
        classes = checked(_CLASSES, tree.pop("classes", None))
        facts = {"encoder_source": None, **flat(as_meant(tree))}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is damaged", remedy="restore it from a copy, or choose another name"
        ) from None
    if version not in range(1, SCHEMA_VERSION + 1):
        raise UserError(
            f"{path}: has schema_version {shortened(version)}, this raymaml reads 1 to"
            f" {SCHEMA_VERSION}",
            remedy="use the raymaml that wrote it, or choose another name",
        )
    return RunFile(version, facts, classes)


def as_meant(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, or the part that ``run.json`` holds, with the keys that it lacks and that
    did not use to mean today's default.

    Every rule of this kind stands here.
    """
    meant = dict(tree)
    match meant.get("data"):
        case {"augment": {"support": _} as train, **data}:  # run.json of schema version 1
            meant["data"] = {**data, "augment": {"train": train}}
    match meant:
        case {"seed": seed, "episodes": {**episodes}}:  # before they had a seed it was theirs
            meant["episodes"] = {"seed": seed, **episodes}
    return meant


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two flat identities: by key, the value before and the one now."""
    found = {}
    for key in {**before, **now}:
        had = before[key] if key in before else _default(key)
        has = now.get(key, ABSENT)
        if had != has and (had, has) != (ABSENT, None):
            found[key] = had, has
    return found


def require_equal(
    place: Place,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    sentence: str,
    remedy: str,
    *,
    remedies: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> None:
    """Check that two flat identities are equal.

    Args:
        place: the file or folder that the message is about.
        before: one identity.
        now: the other one.
        sentence: about a key that differs, with the fields ``key``, ``had`` and ``has``.
        remedy: for every key...
        remedies: ...but these.
        ignored: keys that may differ.

    Raises:
        UserError: naming every key that differs.
    """
    with gathered() as mistakes:
        for key, (had, has) in differences(before, now).items():
            if key not in ignored:
                text = sentence.format(key=key, had=shortened(had), has=shortened(has))
                mistakes.add(f"{place}: {text}", (remedies or {}).get(key, remedy))


def unsaid_on_pictures(*sides: Mapping[str, Any]) -> set[str]:
    """Return the keys of the section on pictures, if a flat identity, of before, lacks it."""
    keys = [{key for key in side if key.startswith("preprocessing.")} for side in sides]
    return set() if all(keys) else set().union(*keys)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested sections by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, Mapping) and name not in _VALUES:
            leaves.update(flat(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def _default(key: str) -> Any:
    """Return the default of a config key, ``ABSENT`` where there is none."""
    kind: Any = Config
    field = None
    for part in key.split("."):
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return ABSENT
        kind = field.annotation
    value = PydanticUndefined if field is None else field.get_default(call_default_factory=True)
    return ABSENT if value is PydanticUndefined else to_jsonable_python(value)
