"""What decides a record, and which records of other code are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config
from raymaml.data.shard_format import SCHEMA_VERSION as ORDER
from raymaml.evaluation.records import identity_of, read_chunk
from raymaml.models.source import encoder_source, source_files
from raymaml.storage.files import reaching
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CheckpointCard, versions

if TYPE_CHECKING:
    from raymaml.evaluation.arm import Arm

CODE = ("versions", "encoder_source")
"""The keys of an identity that are of the code; to render finished records it does not matter."""


def settings_identity(
    config: Config, card: CheckpointCard | None, bank_hash: str
) -> dict[str, str]:
    """Return what decides a record beside the code; ``card`` is of the checkpoint, if any."""
    weights = f"initial, seed {config.seed}" if card is None else card.files["params.pt"]
    spec = config.episodes.test.model_dump(exclude={"num_episodes"})
    return {
        "weights": weights,
        "model": config.model.model_dump_json(),
        "inner": config.test_inner.model_dump_json(),
        "precision": config.cluster.precision,
        "memory_format": config.cluster.memory_format,
        "normalize": json.dumps(config.data.model_dump(mode="json")["normalize"]),
        "augment": config.data.augment.test.model_dump_json(),
        "bank": bank_hash,
        "order": str(ORDER),
        "episodes": json.dumps({"seed": config.episodes.seed, "split": "test", **spec}),
    }


def code_identity(model: ModelConfig) -> dict[str, str]:
    """Return what code decides a record: versions, and the files of an encoder of one's own."""
    source = encoder_source(model)
    own = {} if source is None else {"encoder_source": source}
    return {"versions": json.dumps(versions(), sort_keys=True), **own}


def of_any_code(place: Place, settings: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the identities of records below ``place`` that differ from ``settings`` in code alone.

    The newest come first.
    """
    with reaching(place):
        paths: list[Place] = sorted(place.glob("*/*.parquet"), key=str)
        files = {path.parent: path for path in paths}
        newest = sorted(files.values(), key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in newest:
        with suppress(UserError):  # what is torn is no record
            identity = identity_of(read_chunk(path))
            if {key: value for key, value in identity.items() if key not in CODE} == settings:
                found.append(identity)
    return found


def reasons(arms: Iterable[Arm], folder: Place) -> Iterator[str]:
    """Name the arms that have records of other code, and the encoders that were edited."""
    for arm in arms:
        settings = {key: value for key, value in arm.identity.items() if key not in CODE}
        earlier = of_any_code(arm.folder, settings)
        if earlier and arm.identity not in earlier:
            changed = ", ".join(_changes(earlier[0], arm))
            yield f"{folder}: {arm.name}: judged again, since records are of {changed}"
        if arm.was_edited:
            files = ", ".join(map(str, source_files(arm.model).values()))
            yield (
                f"{folder}: {arm.name}: model.encoder {arm.model.encoder} was edited after"
                f" training ({files}); it is judged as it is now"
            )


def _changes(before: Mapping[str, str], arm: Arm) -> Iterator[str]:
    had, has = (json.loads(each.get("versions", "{}")) for each in (before, arm.identity))
    for name, version in has.items():
        if had.get(name) != version:
            yield f"{name} {had.get(name)} (now {version})"
    if before.get("encoder_source") != arm.identity.get("encoder_source"):
        yield f"another source of model.encoder {arm.model.encoder}"
