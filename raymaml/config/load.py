"""Configs, studies and sweeps: YAML and ``key.path=value``, with every mistake in one message.

Precedence: defaults < file < `set` of a study or sweep < overrides of the command line < changes of
a model, an arm or a trial. An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import cut
from raymaml.config.base import Section
from raymaml.config.explain import (
    COMMAND_LINE,
    RawPath,
    explain,
    keys_of,
    mistakes_of,
    validated,
)
from raymaml.config.schema import Config
from raymaml.config.study import StudyConfig
from raymaml.config.sweep import SweepConfig
from raymaml.config.yaml_text import KeyPath, Origin, Origins, dump_mapping, parse, read_yaml
from raymaml.storage.place import Place, beside, is_remote, to_place

_KINDS: dict[type[Section], tuple[str, str]] = {
    Config: ("a config", "`raymaml train {0}` or `raymaml test {0}`"),
    StudyConfig: ("a study file", "`raymaml study {0}`"),
    SweepConfig: ("a sweep file", "`raymaml sweep {0}`"),
}
"""The three kinds of file, and the commands for each."""
_STAND_INS = {"name": "unknown", "title": "", "config": ""}
"""Values of the keys that a study needs, where they are missing or wrong; "" names no config."""


@dataclass(frozen=True)
class Changes:
    """Values by dotted key, and the name of their place in messages."""

    origin: str
    values: Mapping[str, Any]


def load_config(path: Config | Place | str, *overrides: Sequence[str] | Changes) -> Config:
    """Read ``path``, a file or a URI, apply ``overrides`` in their order and check the whole.

    A ``Config`` in the place of a path is the one that the overrides change.

    Raises:
        UserError: with every problem found: file, line, key, value and the allowed values.
    """
    tree: dict[str, Any]
    origins: Origins
    if isinstance(path, Config):
        tree, origins, file = path.model_dump(mode="json"), {}, f"config {path.name}"
    else:
        try:
            (tree, origins), file = _read(to_place(path), Config), str(path)
        except ValueError as error:
            raise UserError(f"{path}: it {error}") from None
    with gathered() as mistakes:
        for override in overrides:
            if isinstance(override, Changes):
                for name, value in override.values.items():
                    keys, text = tuple(name.split(".")), f"{override.origin}: {name}"
                    origin = {keys: Origin(override.origin)}
                    with mistakes.kept():
                        _change(tree, origins, keys, value, origin, text=text)
                continue
            for text in override:
                with mistakes.kept():
                    _change(tree, origins, *_read_override(text), text=cut(text, 200))
        return validated(Config, tree, file, origins)


def load_sweep(path: Place) -> SweepConfig:
    """Read a sweep file; its config and the changes to it are not read yet.

    Raises:
        UserError: with every problem found.
    """
    tree, origins = _read(path, SweepConfig)
    return validated(SweepConfig, tree, str(path), origins)


def load_study(path: Place) -> tuple[StudyConfig, list[str]]:
    """Read a study file as far as it can be understood; its config is not read yet.

    Returns:
        The study, without the parts that are wrong by themselves, and every problem of the file.

    Raises:
        UserError: the file is no YAML mapping, or nothing of it is a study's.
    """
    tree, origins = _read(path, StudyConfig)
    study, problems, rest, wrong = None, list[str](), tree, set[RawPath]()
    while study is None:
        try:
            study = StudyConfig.model_validate(rest)
        except ValidationError as error:
            # a later error comes from the parts dropped here, not from the user
            problems = problems or [*explain(error, StudyConfig, tree, str(path), origins)]
            whole, paths = rest, {_part_of(each, rest) for each in mistakes_of(error)}
            rest = _without(rest, paths)
            rest |= {key: _STAND_INS[key] for key in _STAND_INS if (key,) in paths}
            if rest == whole:  # nothing is left that could be understood
                raise UserError(*problems) from None
            wrong |= paths
    # The other checks would report an unreadable arm or model as unknown.
    if any(at[0] in ("arms", "models", "cross") and len(at) <= 2 for at in wrong if at):
        return study, problems
    return study, problems + [f"{path}: {problem}" for problem in study.disagreements()]


def _part_of(mistake: ErrorDetails, tree: Any) -> RawPath:
    """Return the path of the wrong part of a study. If a key is missing, return the path of its
    section."""
    keys = keys_of(mistake, tree)
    return keys[:-1] if mistake["type"] == "missing" and len(keys) > 1 else keys


def _without(tree: Any, dropped: Set[RawPath], at: RawPath = ()) -> Any:
    """Return ``tree`` without the values at these paths."""
    if not isinstance(tree, dict | list):
        return tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    kept = {
        key: _without(value, dropped, (*at, key))
        for key, value in items
        if (*at, key) not in dropped
    }
    return kept if isinstance(tree, dict) else [*kept.values()]


def named_config(path: Place, config: Path) -> Place:
    """Return the config that a study or sweep file names, relative to that file.

    Raises:
        UserError: there is none.
    """
    place = beside(path, config)
    if not is_remote(place) and not place.exists():
        raise UserError(
            f"{path}: config is {str(config)!r}, and there is no {place}",
            remedy="name one, relative to this file, or give --config",
        )
    return place


def dump_config(config: Config) -> str:
    """Write ``config`` as YAML that ``load_config`` reads back to an equal value."""
    return dump_mapping(config.model_dump(mode="json"))


def _read(path: Place, kind: type[Section]) -> tuple[dict[str, Any], Origins]:
    """Return the content of a file of this kind; whatever mistakes it has, another is refused."""
    tree, origins = read_yaml(path)
    found, needed = _kind_of(tree), _KINDS[kind][0]
    if found not in (None, kind):
        title, use = _KINDS[found]
        raise UserError(
            f"{path}: is {title}, and {needed} is needed here", remedy=f"use {use.format(path)}"
        )
    if found is None and "schema_version" in tree:
        raise UserError(
            f"{path}: is a file that raymaml writes, and {needed} is needed here",
            remedy="the config of a run is config.yaml in the run's folder",
        )
    keys, known = [str(key) for key in tree if key != "name"], kind.model_fields
    if found is None and keys and not any(difflib.get_close_matches(key, known) for key in keys):
        required = ", ".join(key for key, field in known.items() if field.is_required())
        raise UserError(
            f"{path}: is not {needed}: its keys are {cut(', '.join(keys), 100)}",
            remedy=f"{needed} has {required}",
        )
    return tree, origins


def _kind_of(tree: Mapping[str, Any]) -> type[Section] | None:
    """Return the kind of a file, by keys that only one kind has; None if that is not clear."""
    if len(tree.keys() & {"data", "episodes", "outer", "model", "inner"}) >= 2:
        return Config
    if "config" in tree and tree.keys() & {"arms", "cross", "checks", "models"}:
        return StudyConfig
    return SweepConfig if "config" in tree and "space" in tree else None


def _read_override(text: str) -> tuple[KeyPath, Any, Origins]:
    """Return the keys and the value of ``key.path=value``, and the origins of all in it."""
    name, equals, value = text.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise UserError(
            f"{cut(text, 200)}: is not an override",
            remedy="write key.path=value, as in outer.lr=1e-3, without spaces",
        )
    try:
        return keys, *parse(value, keys, lambda _line: COMMAND_LINE)
    except ValueError as error:
        raise UserError(f"{cut(text, 200)}: the value is not YAML: {error}") from None


def _change(
    tree: dict[str, Any], origins: Origins, keys: KeyPath, value: Any, new: Origins, *, text: str
) -> None:
    """Set a value in ``tree``; ``text`` is the change as messages name it, ``new`` its origins."""
    section = tree
    for depth, key in enumerate(keys[:-1], 1):
        origins.setdefault(keys[:depth], Origin(new[keys].place))
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            name = ".".join(keys[:depth])
            raise UserError(f"{text}: {name} is a value, not a section")
    section[keys[-1]] = value
    for old in [old for old in origins if old[: len(keys)] == keys]:
        del origins[old]
    origins.update(new)
