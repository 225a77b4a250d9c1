"""YAML and ``key.path=value`` -> ``Config``, with every mistake in one message.

Precedence: defaults < file < `set` of a study < overrides of the command line < what tells the
models and arms of a study apart. An unknown key is an error with a suggestion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from raymaml.common.errors import Mistakes, UserError, gathered
from raymaml.common.untrusted import cut
from raymaml.config.explain import explain
from raymaml.config.kinds import require_kind
from raymaml.config.schema import Config
from raymaml.config.sweep import SweepConfig
from raymaml.config.yaml_text import (
    COMMAND_LINE,
    KeyPath,
    Origin,
    Origins,
    dump_mapping,
    read_value,
    read_yaml,
)
from raymaml.storage.place import Place, beside, is_remote, to_place


@dataclass(frozen=True)
class Changes:
    """Values by dotted key, and where they stand: what messages call the place."""

    origin: str
    values: Mapping[str, Any]


class _Change(NamedTuple):
    text: str  # as messages name it
    keys: KeyPath
    value: Any
    origins: Origins  # of the value, and of all in it


def load_config(path: Place | str, *overrides: Sequence[str] | Changes) -> Config:
    """Read ``path``, a file or a URI, apply ``overrides`` in their order and check the whole.

    Raises:
        UserError: with every problem found, each naming file, line, key, value and what is
            allowed.
    """
    try:
        file = to_place(path)
    except ValueError as error:
        raise UserError(f"{path}: it {error}") from None
    tree, origins = read_yaml(file)
    require_kind(tree, file, "config", Config)
    with gathered() as mistakes:
        for override in overrides:
            for change in _changes(override, mistakes):
                with mistakes.kept():
                    _apply(tree, origins, change)
        try:
            loaded = Config.model_validate(tree)
        except ValidationError as error:
            mistakes.extend(explain(error, origins, str(path), Config))
    return loaded


def named_config(path: Place, config: Path) -> Place:
    """Return the config that a study or sweep file names, relative to that file.

    Raises:
        UserError: there is none.
    """
    place = beside(path, config)
    if not is_remote(place) and not place.exists():
        raise UserError(
            f"{path}: config is {str(config)!r}, and there is no {place}; name one, relative to"
            " this file, or give --config"
        )
    return place


def load_sweep(path: Place) -> SweepConfig:
    """Read a sweep file; its config and the changes to it are not read yet.

    Raises:
        UserError: with every problem found.
    """
    tree, origins = read_yaml(path)
    require_kind(tree, path, "sweep", SweepConfig)
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error, origins, str(path), SweepConfig)) from None


def dump_config(config: Config) -> str:
    """Write ``config`` as YAML that ``load_config`` reads back to an equal value."""
    return dump_mapping(config.model_dump(mode="json"))


def check_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check keys and values that were made by a program.

    Raises:
        UserError: naming everything that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error, {}, origin, Config)) from None


def _changes(override: Sequence[str] | Changes, mistakes: Mistakes) -> Iterator[_Change]:
    """Yield the changes that ``override`` makes; note what is no override."""
    if isinstance(override, Changes):
        for name, value in override.values.items():
            keys, text = tuple(name.split(".")), f"{override.origin}: {name}"
            yield _Change(text, keys, value, {keys: Origin(override.origin)})
        return
    for text in override:
        name, equals, value = text.partition("=")
        keys, shown = tuple(name.split(".")), cut(text, 200)
        if not equals or not all(keys):
            mistakes.add(
                f"{shown}: is not an override",
                remedy="write key.path=value, as in outer.lr=1e-3, without spaces",
            )
            continue
        try:
            with mistakes.kept():
                yield _Change(shown, keys, *read_value(value, keys, COMMAND_LINE))
        except ValueError as error:
            mistakes.add(f"{shown}: the value is not YAML: {error}")


def _apply(tree: dict[str, Any], origins: Origins, change: _Change) -> None:
    section, keys = tree, change.keys
    for depth, key in enumerate(keys[:-1], 1):
        origins.setdefault(keys[:depth], Origin(change.origins[keys].place))
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            name = ".".join(keys[:depth])
            raise UserError(f"{change.text}: {name} is a value, not a section")
    section[keys[-1]] = change.value
    for old in [old for old in origins if old[: len(keys)] == keys]:
        del origins[old]
    origins.update(change.origins)
