"""The identity of records: the values that decide them, and the code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config
from raymaml.data.shard_format import SCHEMA_VERSION as ORDER
from raymaml.evaluation.record_files import read_chunk
from raymaml.evaluation.records import identity_of
from raymaml.models.source import encoder_source
from raymaml.storage.files import reaching
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CheckpointCard, versions

CODE = ("versions", "encoder_source")
"""The keys that name the code; a report of finished records does not depend on them."""


def settings_identity(
    config: Config, card: CheckpointCard | None, bank_hash: str
) -> dict[str, str]:
    """Return the identity without the code; ``card`` is that of the checkpoint, if any."""
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
    """Return the identity of the code: versions, and the files of an encoder of one's own."""
    source = encoder_source(model)
    own = {} if source is None else {"encoder_source": source}
    return {"versions": json.dumps(versions(), sort_keys=True), **own}


def of_any_code(place: Place, settings: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the identities of records below ``place`` with these settings, the newest first."""
    with reaching(place):
        paths: list[Place] = sorted(place.glob("*/*.parquet"), key=str)
        files = {path.parent: path for path in paths}
        newest = sorted(files.values(), key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in newest:
        with suppress(UserError):  # what is torn is no record
            identity = identity_of(read_chunk(path))
            if without_code(identity) == settings:
                found.append(identity)
    return found


def without_code(identity: Mapping[str, str]) -> dict[str, str]:
    """Return the part of an identity that the settings decide."""
    return {key: value for key, value in identity.items() if key not in CODE}


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Yield how the code of records, ``before``, differs from that of ``now``."""
    had, has = (json.loads(each.get("versions", "{}")) for each in (before, now))
    for name, version in has.items():
        if had.get(name) != version:
            yield f"{name} {had.get(name)} (now {version})"
    if before.get("encoder_source") != now.get("encoder_source"):
        yield f"another source of model.encoder {json.loads(now['model'])['encoder']}"
