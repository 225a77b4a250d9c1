"""YAML files and texts: values, with the place and the text of each.

``1e-3`` is a number, which YAML 1.1 reads as text. A key given twice is an error, and so is a
number that YAML 1.1 reads otherwise than people do: ``010`` is 8 there, and ``12:30`` is 750.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import yaml

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import cut, shortened
from raymaml.storage.place import Place

MAX_DEPTH, MAX_VALUES = 50, 100_000
"""Of a YAML document, each value counted as often as anchors repeat it."""
KeyPath = tuple[str, ...]
_MISREAD = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class Origin(NamedTuple):
    """Where a value comes from."""

    place: str
    """As messages name it: ``file:line``, or ``command line``."""
    text: str | None = None
    """As it is written, of a scalar without quotes; None where it is anything else, or unknown."""


Origins = dict[KeyPath, Origin]


COMMAND_LINE = "command line"
"""The place of an override."""


def quoted(text: str, key: str, place: str) -> str:
    """Write ``text`` so that YAML reads it as text; a shell takes one pair of quotes away.

    An override sets a list as a whole, so a value in a list is shown without its key.
    """
    if place != COMMAND_LINE:
        return f'"{text}"'
    return f"'\"{text}\"'" if _is_in_list(key.split(".")) else f"{key}='\"{text}\"'"


def _is_in_list(keys: Sequence[str]) -> bool:
    return any(key.isdigit() for key in keys)


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 floats."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def dump_mapping(tree: Mapping[str, Any]) -> str:
    """Write keys and plain values as YAML, in their order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, width=100)
    return text


def read_mapping(path: Place) -> dict[str, Any]:
    """Read a YAML file of somebody else's.

    Raises:
        UserError: it cannot be read, or holds anything but keys and values.
    """
    return read_yaml(path)[0]


def read_yaml(path: Place) -> tuple[dict[str, Any], Origins]:
    """Return the tree of a YAML file and, for each key path, the origin of its value.

    Raises:
        UserError: it cannot be read, is no YAML, or holds anything but keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: is not UTF-8 text; give a YAML config file, or save it as UTF-8"
        ) from None
    except IsADirectoryError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a file: the config of a run is"
            " config.yaml in the run's folder"
        ) from None
    except Exception as error:  # the file systems of URIs have errors of their own
        missing = "there is none" if isinstance(error, FileNotFoundError) else None
        reason = getattr(error, "strerror", None) or missing or reason_of(error)
        raise UserError(f"{path}: cannot be read ({reason}); give a config file") from None
    try:
        node = _compose(text)
    except ValueError as error:
        raise UserError(f"{path}: is not YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        found = "it is empty" if node is None else f"but {found}"
        raise UserError(
            f"{path}: holds no mapping ({found}); expected keys such as name, data, outer"
        )
    origins, problems = _origins_of(node, (), lambda line: f"{path}:{line}")
    if problems:
        raise UserError(*problems)
    try:
        tree = _construct(node)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return cast("dict[str, Any]", tree), origins


def read_value(text: str, keys: KeyPath, place: str) -> tuple[Any, Origins]:
    """Return the value that ``text`` stands for, and the origins of what it sets under ``keys``.

    Raises:
        UserError: it holds a key twice, or a number that is easily misread.
        ValueError: it is no YAML.
    """
    node = _compose(text)
    if node is None:
        return None, {keys: Origin(place, "")}
    origins, problems = _origins_of(node, keys, lambda _line: place)
    if problems:
        raise UserError(*problems)
    return _construct(node), {keys: _origin(node, place)} | origins


def _compose(text: str) -> yaml.Node | None:
    """Return what a YAML document consists of, bounded in depth and size.

    Anchors and merge keys let a page of text stand for more values than a computer can hold.

    Raises:
        ValueError: it is no YAML, or too much.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_syntax_problem(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error).replace('in "<unicode string>", ', "at ")) from None
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


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    """Say where a text is no YAML, why, and what to write instead."""
    mark, problem = error.problem_mark, error.problem or "it cannot be understood"
    if mark is None:
        return reason_of(error)
    found = mark.buffer[mark.pointer : mark.pointer + 1] if mark.buffer else ""
    where = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    if found == "\t":
        return f"{where}; indent with spaces, not with tabs"
    if "alias" in f"{error.context} {problem}" or (found and found in "%@`&!|>"):
        return f'{where}; put a text that begins with one of * & ! % @ ` | > into quotes: "*.norm"'
    if problem.startswith("mapping values are not allowed"):
        return f"{where}; indent the keys of a section alike, and quote a text that holds ': '"
    if error.context is None or error.context_mark is None:
        return where
    begun = f"{error.context} from line {error.context_mark.line + 1} on"
    return f"line {mark.line + 1}, column {mark.column + 1}: {begun}, {problem}"


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


def _origins_of(
    node: yaml.Node, prefix: KeyPath, place_of: Callable[[int], str]
) -> tuple[Origins, list[str]]:
    """Return the origins of all below ``node``, and what is wrong with keys and numbers there."""
    origins: Origins = {}
    problems = list(_misread(node, prefix, place_of(node.start_mark.line + 1)))
    for key, key_node, value_node in _items(node, prefix):
        place = place_of(key_node.start_mark.line + 1)
        if key in origins and isinstance(node, yaml.MappingNode):
            problems.append(
                f"{place}: {'.'.join(key)} is given twice (first at {origins[key].place}); keep one"
            )
        origins[key] = _origin(value_node, place)
        below, wrong = _origins_of(value_node, key, place_of)
        origins |= below
        problems += wrong
    return origins, problems


def _items(node: yaml.Node, prefix: KeyPath) -> Iterator[tuple[KeyPath, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*prefix, str(number)), item, item
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            yield (*prefix, str(key_node.value)), key_node, value_node


def _origin(node: yaml.Node, place: str) -> Origin:
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return Origin(place, node.value if plain else None)


def _misread(node: yaml.Node, keys: KeyPath, place: str) -> Iterator[str]:
    text, key = _origin(node, place).text, ".".join(keys)
    if text and _MISREAD.fullmatch(text) and not node.tag.endswith(":str"):
        point = "; where it follows a comma in a number, write the number with a point: 0.001"
        yield (
            f"{place}: {key} is {cut(text, 100)}, which YAML reads as"
            f" {shortened(_construct(node))}; if it is text, quote it:"
            f" {quoted(cut(text, 100), key, place)}; if it is a number, write it without leading"
            f" zeros or colons{point if _is_in_list(keys) else ''}"
        )
