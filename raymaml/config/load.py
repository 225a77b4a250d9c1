"""YAML and ``key.path=value`` -> ``Config``, with every mistake in one message.

Precedence: defaults < file < changes of a study < overrides of the command line. A key given twice
is an error, an unknown key is an error with a suggestion, and ``1e-3`` is a number (YAML 1.1 reads
it as text).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from raymaml.config.schema import Config
from raymaml.config.sources import SOURCE_KINDS
from raymaml.config.study import StudyConfig
from raymaml.config.sweep import SCHEDULERS, SweepConfig
from raymaml.errors import UserError, reason_of

KeyPath = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Changes:
    """Values by dotted key, and where they stand: what messages call the place."""

    origin: str
    values: Mapping[str, Any]


class _Change(NamedTuple):
    text: str  # as messages name it
    keys: KeyPath
    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 floats."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: Path | str, *overrides: Sequence[str] | Changes) -> Config:
    """Read ``path``, apply ``overrides`` in their order and check the whole.

    Raises:
        UserError: with every problem found, each naming file, line, key, value and what is
            allowed.
    """
    return _load(Path(path), Config, overrides)


def load_study(path: Path) -> StudyConfig:
    """Read a study file; its config and the changes to it are not read yet.

    Raises:
        UserError: with every problem found.
    """
    return _load(path, StudyConfig, ())


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file; its config and the changes to it are not read yet.

    Raises:
        UserError: with every problem found.
    """
    return _load(path, SweepConfig, ())


def _load(path: Path, model: type[Model], overrides: Iterable[Sequence[str] | Changes]) -> Model:
    tree, places = _read_yaml(path)
    problems: list[str] = []
    for override in overrides:
        for change in _changes(override, problems):
            try:
                _apply(tree, places, change)
            except UserError as error:
                problems.extend(error.problems)
    try:
        loaded = model.model_validate(tree)
    except ValidationError as error:
        raise UserError(*problems, *_explain(error, places, str(path), model)) from None
    if problems:
        raise UserError(*problems)
    return loaded


def dump_config(config: Config) -> str:
    """Write ``config`` as YAML that ``load_config`` reads back to an equal value."""
    return dump_mapping(config.model_dump(mode="json"))


def dump_mapping(tree: Mapping[str, Any]) -> str:
    """Write keys and plain values as YAML, in their order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, width=100)
    return text


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the tree of a YAML file and, for each key path, the place that sets it."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a config file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a YAML config file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {reason_of(error)}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: holds no mapping; expected keys such as name, data, outer")
    places: dict[KeyPath, str] = {}
    duplicates: list[str] = []
    _record_places(node, (), str(path), places, duplicates)
    if duplicates:
        raise UserError(*duplicates)
    loader = _Loader("")
    try:
        tree = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {reason_of(error)}") from None
    return cast("dict[str, Any]", tree), places


def _record_places(
    node: yaml.Node, prefix: KeyPath, file: str, places: dict[KeyPath, str], duplicates: list[str]
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        place = f"{file}:{key_node.start_mark.line + 1}"
        if key in places:
            duplicates.append(
                f"{place}: {'.'.join(key)} is given twice (first at {places[key]}); keep one"
            )
        places[key] = place
        _record_places(value_node, key, file, places, duplicates)


def _changes(override: Sequence[str] | Changes, problems: list[str]) -> Iterator[_Change]:
    """Yield the changes that ``override`` makes; note what is no override."""
    if isinstance(override, Changes):
        for name, value in override.values.items():
            text = f"{override.origin}: {name}"
            yield _Change(text, tuple(name.split(".")), value, override.origin)
        return
    for text in override:
        name, equals, value = text.partition("=")
        keys = tuple(name.split("."))
        if not equals or not all(keys):
            problems.append(
                f"{text}: is not an override; write key.path=value, as in outer.lr=1e-3"
            )
            continue
        try:
            yield _Change(text, keys, yaml.load(value, Loader=_Loader), "command line")
        except yaml.YAMLError:
            problems.append(f"{text}: the value is not YAML")


def _apply(tree: dict[str, Any], places: dict[KeyPath, str], change: _Change) -> None:
    section = tree
    for depth, key in enumerate(change.keys[:-1], 1):
        places.setdefault(change.keys[:depth], change.place)
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            name = ".".join(change.keys[:depth])
            raise UserError(f"{change.text}: {name} is a value, not a section")
    section[change.keys[-1]] = change.value
    places[change.keys] = change.place


def _explain(
    error: ValidationError, places: Mapping[KeyPath, str], file: str, model: type[BaseModel]
) -> Iterable[str]:
    """Turn pydantic's errors into sentences, in the order of the file."""
    details, explained = error.errors(), set[KeyPath]()
    for detail in details:
        keys, value = _strip_union_tags(detail["loc"]), detail["input"]
        key = ".".join(keys)
        place = _nearest_place(keys, places, file)
        if detail["type"] == "missing":
            yield f"{place}: {key} is missing; it has no default"
        elif detail["type"] == "union_tag_not_found":
            yield f"{place}: {key}.kind is missing; it has no default"
        elif detail["type"] == "union_tag_invalid":
            kind, allowed = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            yield f"{place}: {key}.kind is {kind!r}; it should be one of {allowed}"
        elif detail["type"] == "extra_forbidden":
            yield f"{place}: {key} is unknown{_did_you_mean(keys, model)}"
        elif detail["type"] == "value_error":
            yield f"{place}: {detail['ctx']['error']}"
        elif keys not in explained:
            reasons = " or ".join(
                other["msg"]
                .removeprefix("Input ")
                .removeprefix("String ")
                .replace("valid tuple", "list")
                .removesuffix(", got an integer")
                for other in details
                if _strip_union_tags(other["loc"]) == keys
            )
            yield f"{place}: {key} is {value!r}; it {reasons}"
        explained.add(keys)


def _strip_union_tags(loc: tuple[int | str, ...]) -> KeyPath:
    """Drop what pydantic adds to a path to tell the branches of a union apart."""
    tags = {*SOURCE_KINDS, *SCHEDULERS, "constrained-int", "literal['auto']"}
    tags |= {"one width", "widths", "policy", "by pattern", "by name", "given"}
    return tuple(str(part) for part in loc if str(part) not in tags)


def _nearest_place(keys: KeyPath, places: Mapping[KeyPath, str], file: str) -> str:
    for length in range(len(keys), 0, -1):
        if keys[:length] in places:
            return places[keys[:length]]
    return file


def _did_you_mean(keys: KeyPath, model: type[BaseModel]) -> str:
    names = _fields_at(keys[:-1], model)
    near = difflib.get_close_matches(keys[-1], names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; allowed here: {', '.join(names)}" if names else ""


def _fields_at(prefix: KeyPath, model: type[BaseModel]) -> list[str]:
    """Return the key names that are allowed in the section ``prefix``, over all its kinds."""
    models = [model]
    for key in prefix:
        annotations = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        if annotations:  # else a key of a mapping, or a place in a list, of such models
            models = [model for note in annotations for model in _models_in(note)]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of somebody else's.

    Raises:
        UserError: it cannot be read, or holds anything but keys and values.
    """
    return _read_yaml(path)[0]


def check_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check keys and values that were made by a program.

    Raises:
        UserError: naming everything that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*_explain(error, {}, origin, Config)) from None
