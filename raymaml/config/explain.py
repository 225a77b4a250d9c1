"""pydantic's errors as sentences: place, key, value, what is allowed, and the remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raymaml.common.errors import UserError, did_you_mean
from raymaml.common.untrusted import cut, shortened
from raymaml.config.yaml_text import KeyPath, Origin, Origins

COMMAND_LINE = "command line"
"""The place of an override."""
MOST_MISTAKES = 50
"""Maximum number of mistakes reported per file."""
_MOST_SUGGESTIONS = 4
_NUMBER = {"int_type", "int_parsing", "int_from_float", "float_type", "float_parsing", "number"}
Model = TypeVar("Model", bound=BaseModel)
RawPath = tuple[int | str, ...]


def validated(
    model: type[Model], tree: Mapping[Any, Any], file: str, origins: Origins | None = None
) -> Model:
    """Return the settings that ``tree`` holds; ``file`` is the place of keys without an origin.

    Raises:
        UserError: with every mistake found.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(error, model, tree, file, origins)) from None


def explain(
    error: ValidationError,
    model: type[BaseModel],
    tree: Mapping[Any, Any],
    file: str,
    origins: Origins | None = None,
) -> Iterator[str]:
    """Turn pydantic's errors into sentences, in the order of the file; see ``validated``."""
    origins = origins or {}
    details = mistakes_of(error)
    paths = [tuple(map(str, keys_of(detail, tree))) for detail in details]
    for number, (detail, keys) in enumerate(zip(details[:MOST_MISTAKES], paths, strict=False)):
        kind, key, place = detail["type"], ".".join(keys), _nearest_place(keys, origins, file)
        if keys and ":" in keys[-1] and detail["input"] is None:
            name, _, value = keys[-1].partition(":")
            yield f"{place}: {key} lacks a space after the colon: write {name}: {value}"
        elif kind == "missing" and keys[-1].isdigit():
            yield f"{place}: {'.'.join(keys[:-1])} has no value number {int(keys[-1]) + 1}"
        elif kind == "missing":
            place = _nearest_place((*keys[:-1], "kind"), origins, file)
            yield f"{place}: {key} is missing; it has no default"
        elif kind == "union_tag_not_found":
            yield f"{place}: {key}.kind is missing; it has no default"
        elif kind == "union_tag_invalid":
            place = _nearest_place((*keys, "kind"), origins, file)
            found, allowed = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            hint = _nearest_choice(found, allowed)
            yield f"{place}: {key}.kind is {shortened(found)}; it should be one of {allowed}{hint}"
        elif kind == "value_error":
            text = str(detail["ctx"]["error"])
            yield f"{_place_of_change(text, origins, file) or place}: {text}"
        elif kind == "invalid_key" or (kind == "extra_forbidden" and keys[-1].isdigit()):
            yield (
                f"{place}: {key} is no key, since keys are text; quote it, or, where it follows a"
                " comma in a number, write the number with a point: 0.001"
            )
        elif kind == "extra_forbidden":
            yield f"{place}: {key} is unknown{_did_you_mean(keys, model)}"
        elif keys not in paths[:number]:
            alike = [each for each, other in zip(details, paths, strict=True) if other == keys]
            origin = origins.get(keys, Origin(place))
            yield f"{place}: {key} is {_what_is_wrong(alike, key, origin)}"
    if len(details) > MOST_MISTAKES:
        yield f"{file}: and {len(details) - MOST_MISTAKES} mistakes more"


def mistakes_of(error: ValidationError) -> list[ErrorDetails]:
    """Return pydantic's errors, without those of lists that are too short for wrong items alone."""
    return [
        detail
        for detail in error.errors()
        if detail["type"] != "too_short" or len(detail["input"]) < detail["ctx"]["min_length"]
    ]


def keys_of(detail: ErrorDetails, tree: Any) -> RawPath:
    """Return the path of an error without pydantic's names for the branches of a union."""
    keys: list[int | str] = []
    for part in detail["loc"]:
        if isinstance(tree, Mapping):
            found = part in tree
        else:
            found = isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)
        if found:
            keys, tree = [*keys, part], tree[part]
    if detail["type"] in ("missing", "invalid_key") and keys[-1:] != [detail["loc"][-1]]:
        keys.append(detail["loc"][-1])
    return tuple(keys)


def _what_is_wrong(alike: list[ErrorDetails], key: str, origin: Origin) -> str:
    """Return a value, what is allowed, and the remedy; ``alike`` are its errors."""
    value, kinds = alike[0]["input"], {each["type"] for each in alike}
    allowed = " or ".join(map(_in_our_words, alike))
    shown = _shown(value, origin.text, kinds)
    return f"{shown}; it {allowed}{_remedy(value, key, origin, kinds, allowed)}"


def _in_our_words(detail: ErrorDetails) -> str:
    """Return pydantic's message, which goes on after "it"."""
    if detail["type"] == "string_pattern_mismatch":
        return "should begin with a letter or digit, and hold only letters a-z, digits, . _ and -"
    text = re.sub(r"^(Input|String|Tuple|List|Dictionary) ", "", detail["msg"])
    text = re.sub(r", (got an integer|unable to (parse|interpret) .*)$", "", text)
    text = re.sub(r"valid dictionary( or .*)?$", "section of keys and values", text)
    return text.replace("valid tuple", "list").replace(" after validation, not 0", "")


def _shown(value: Any, text: str | None, kinds: set[str]) -> str:
    """Return a value, and its text where YAML reads that as something else: ``no`` is false."""
    out_of_range = any(kind.startswith(("greater_", "less_", "finite_")) for kind in kinds)
    if text in (None, shortened(value, sys.maxsize)) or isinstance(value, str) or out_of_range:
        return shortened(value)
    names = {None: "no value", True: "true", False: "false"}
    read = names[value] if value is None or isinstance(value, bool) else shortened(value)
    written = cut(text, 100) if text else "empty"
    return written if written == read else f"{written}, which YAML reads as {read}"


def _remedy(value: Any, key: str, origin: Origin, kinds: set[str], allowed: str) -> str:
    text = origin.text
    if kinds & _NUMBER:
        return _remedy_of_a_number(value)
    if kinds & {"tuple_type", "list_type"} and isinstance(value, str | int | float):
        return f": write [{cut(str(value), 100)}]"
    if "model_attributes_type" in kinds and isinstance(value, str):
        return f": write {{kind: {cut(value, 100)}}}"
    if "literal_error" in kinds and isinstance(value, str):
        return _nearest_choice(value, allowed)
    is_scalar = not isinstance(value, str | list | dict)
    if is_scalar and text != "" and (kinds <= {"string_type", "place"} or repr(text) in allowed):
        how = f": {_quoted(cut(text, 100), key, origin.place)}" if text else ""
        return f"; if it is text, quote it{how}"
    return ""


def _quoted(text: str, key: str, place: str) -> str:
    """Return ``text`` in quotes, of which a shell removes one pair; a list is set as a whole."""
    if place != COMMAND_LINE:
        return f'"{text}"'
    is_in_list = any(map(str.isdigit, key.split(".")))
    return f"'\"{text}\"'" if is_in_list else f"{key}='\"{text}\"'"


def _remedy_of_a_number(value: Any) -> str:
    if isinstance(value, str) and value.lower() == "none":
        return ": write null for no value"
    if isinstance(value, str):
        forms = "1000, 0.001 or 1e-3, without quotes, leading zeros, separators and units"
        return f": write numbers as {forms}"
    without = ": write whole numbers as 1000, without a point and an exponent"
    return without if isinstance(value, float) else ""


def _nearest_choice(value: str, allowed: str) -> str:
    return did_you_mean(value, re.findall(r"'([^']*)'", allowed))


def _nearest_place(keys: KeyPath, origins: Origins, file: str) -> str:
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]].place
    return file


def _place_of_change(text: str, origins: Origins, file: str) -> str | None:
    """Return the place of the last change to a key that a message names; None: of none."""
    named = re.findall(r"[a-z_*]+(?:\.[a-z_*]+)+", text)
    for keys, (place, _) in reversed(origins.items()):
        key = ".".join(keys)
        if place.startswith(f"{file}:"):
            continue
        if any(fnmatchcase(key, each) or each.startswith(f"{key}.") for each in named):
            return place
    return None


def _did_you_mean(keys: KeyPath, model: type[BaseModel]) -> str:
    if keys[-1] in (paths := list(_paths(model))) and "." in keys[-1]:
        outer, _, inner = keys[-1].partition(".")
        return f"; in a file, write the one in the other: {outer}: {{{inner}: ...}}"
    names = _fields_at(keys[:-1], model)
    if near := did_you_mean(keys[-1], names):
        return near
    if elsewhere := [path for path in paths if path.split(".")[-1] == keys[-1]]:
        return f"; did you mean {' or '.join(elsewhere[:_MOST_SUGGESTIONS])}?"
    return f"; allowed here: {', '.join(names)}" if names else ""


def _paths(model: type[BaseModel]) -> Iterator[str]:
    """Yield every dotted key that ``model`` has."""
    for name, field in model.model_fields.items():
        yield name
        for inner in models_in(field.annotation):
            yield from (f"{name}.{path}" for path in _paths(inner))


def _fields_at(prefix: KeyPath, model: type[BaseModel]) -> list[str]:
    """Return the key names that are allowed in the section ``prefix``, over all its kinds."""
    models = [model]
    for key in prefix:
        annotations = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        if annotations:  # else a key of a mapping, or a place in a list, of such models
            models = [model for note in annotations for model in models_in(note)]
    return sorted({name for model in models for name in model.model_fields})


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]
