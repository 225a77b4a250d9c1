"""YAML and ``key.path=value`` -> ``Config``, with every mistake in one message.

Precedence: defaults < file < `set` of a study < overrides of the command line < what tells the
models and arms of a study apart. A key given twice
is an error, an unknown key is an error with a suggestion, and ``1e-3`` is a number (YAML 1.1 reads
it as text).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raymaml.config.schema import Config
from raymaml.config.sources import SOURCE_KINDS
from raymaml.config.sweep import SCHEDULERS, SweepConfig
from raymaml.errors import UserError, reason_of
from raymaml.outside import cut, shortened
from raymaml.places import Place, to_place

MAX_DEPTH, MAX_VALUES = 50, 100_000
"""Of a YAML document, each value counted as often as anchors repeat it."""
MOST_MISTAKES = 50
"""Of one file that are told at once."""
KeyPath = tuple[str, ...]


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
    tree, places = read_yaml(file)
    problems: list[str] = []
    for override in overrides:
        for change in _changes(override, problems):
            try:
                _apply(tree, places, change)
            except UserError as error:
                problems.extend(error.problems)
    try:
        loaded = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*problems, *explain(error, places, str(path), Config)) from None
    if problems:
        raise UserError(*problems)
    return loaded


def load_sweep(path: Place) -> SweepConfig:
    """Read a sweep file; its config and the changes to it are not read yet.

    Raises:
        UserError: with every problem found.
    """
    tree, places = read_yaml(path)
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error, places, str(path), SweepConfig)) from None


def dump_config(config: Config) -> str:
    """Write ``config`` as YAML that ``load_config`` reads back to an equal value."""
    return dump_mapping(config.model_dump(mode="json"))


def dump_mapping(tree: Mapping[str, Any]) -> str:
    """Write keys and plain values as YAML, in their order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, width=100)
    return text


def read_yaml(path: Place) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the tree of a YAML file and, for each key path, the place that sets it."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a YAML config file") from None
    except Exception as error:  # the file systems of URIs have errors of their own
        missing = "there is none" if isinstance(error, FileNotFoundError) else None
        reason = getattr(error, "strerror", None) or missing or reason_of(error)
        raise UserError(f"{path}: cannot be read ({reason}); give a config file") from None
    try:
        node = _compose(text)
    except ValueError as error:
        raise UserError(f"{path}: is not YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: holds no mapping; expected keys such as name, data, outer")
    places: dict[KeyPath, str] = {}
    duplicates: list[str] = []
    _record_places(node, (), str(path), places, duplicates)
    if duplicates:
        raise UserError(*duplicates)
    try:
        tree = _construct(node)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return cast("dict[str, Any]", tree), places


def _compose(text: str) -> yaml.Node | None:
    """Return what a YAML document consists of, bounded in depth and size.

    Anchors and merge keys let a page of text stand for more values than a computer can hold.

    Raises:
        ValueError: it is no YAML, or too much.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error)) from None
    except RecursionError:
        raise ValueError(f"it is more than {MAX_DEPTH} deep") from None
    waiting, count = [(node, 1)] if node else [], 0
    while waiting:
        each, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"it is more than {MAX_DEPTH} deep, or holds over {MAX_VALUES} values")
        if isinstance(each, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in each.value for part in pair]
        elif isinstance(each, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in each.value]
    return node


def _construct(node: yaml.Node) -> Any:
    """Return the values that nodes stand for.

    Raises:
        ValueError: naming a value that is not what its tag or its form says.
    """
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error)) from None
    except Exception as error:  # `!!int x`, `2021-13-45`, ...: whatever the conversion raises
        raise ValueError(f"a value is not of its kind ({reason_of(error)})") from None


def _record_places(
    node: yaml.Node, prefix: KeyPath, file: str, places: dict[KeyPath, str], duplicates: list[str]
) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            key = (*prefix, str(number))
            places[key] = f"{file}:{item.start_mark.line + 1}"
            _record_places(item, key, file, places, duplicates)
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
        keys, shown = tuple(name.split(".")), cut(text, 200)
        if not equals or not all(keys):
            problems.append(
                f"{shown}: is not an override; write key.path=value, as in outer.lr=1e-3"
            )
            continue
        try:
            node = _compose(value)
            yield _Change(shown, keys, None if node is None else _construct(node), "command line")
        except ValueError:
            problems.append(f"{shown}: the value is not YAML")


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


def explain(
    error: ValidationError, places: Mapping[KeyPath, str], file: str, model: type[BaseModel]
) -> Iterable[str]:
    """Turn pydantic's errors into sentences, in the order of the file; of very many the first."""
    details, explained = mistakes(error), set[KeyPath]()
    for detail in details[:MOST_MISTAKES]:
        keys, value = _strip_union_tags(detail["loc"]), detail["input"]
        key = ".".join(keys)
        place = _nearest_place(keys, places, file)
        if detail["type"] == "missing":
            yield f"{place}: {key} is missing; it has no default"
        elif detail["type"] == "union_tag_not_found":
            yield f"{place}: {key}.kind is missing; it has no default"
        elif detail["type"] == "union_tag_invalid":
            kind, allowed = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            yield f"{place}: {key}.kind is {shortened(kind)}; it should be one of {allowed}"
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
            yield f"{place}: {key} is {shortened(value)}; it {reasons}"
        explained.add(keys)
    if len(details) > MOST_MISTAKES:
        yield f"{file}: and {len(details) - MOST_MISTAKES} mistakes more"


def mistakes(error: ValidationError) -> list[ErrorDetails]:
    """Return pydantic's errors, but that a list is too short since items of it are wrong."""
    return [
        detail
        for detail in error.errors()
        if detail["type"] != "too_short" or len(detail["input"]) < detail["ctx"]["min_length"]
    ]


def _strip_union_tags(loc: tuple[int | str, ...]) -> KeyPath:
    """Drop what pydantic adds to a path to tell the branches of a union apart."""
    tags = {*SOURCE_KINDS, *SCHEDULERS, "constrained-int", "literal['auto']"}
    tags |= {"one width", "widths", "policy", "by pattern", "by name", "given"}
    tags |= {"difference", "first trials", "precision"}
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


def read_mapping(path: Place) -> dict[str, Any]:
    """Read a YAML file of somebody else's.

    Raises:
        UserError: it cannot be read, or holds anything but keys and values.
    """
    return read_yaml(path)[0]


def check_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check keys and values that were made by a program.

    Raises:
        UserError: naming everything that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error, {}, origin, Config)) from None


def with_seed(tree: Mapping[str, Any]) -> Any:
    """Return the episodes of a stored config; before they had a seed, `seed` was theirs."""
    episodes = tree.get("episodes")
    if not isinstance(episodes, Mapping):
        return episodes
    return {"seed": tree.get("seed", 0), **episodes}
