"""YAML files and texts: values, with the place and the text of each.

A key given twice is an error. Numbers are those of YAML 1.2, which look like numbers: ``1e-3`` is
one, and ``010``, ``12:30`` and dates are text, where YAML 1.1 reads 8, 750 and days.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.storage.place import Place

MAX_DEPTH, MAX_VALUES = 50, 100_000
"""Limits of a YAML document; a value counts once for each time that anchors repeat it."""
KeyPath = tuple[str, ...]
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class Origin(NamedTuple):
    """The place and the text of a value."""

    place: str
    """As messages name it: ``file:line``, or ``command line``."""
    text: str | None = None
    """The text of a scalar without quotes; None for anything else, or where it is unknown."""


Origins = dict[KeyPath, Origin]


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2 and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as in the class above)
        first: [(tag, text) for tag, text in found if not tag.endswith(("int", "float", "stamp"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _kind, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_form})$"), list("-+0123456789.")
    )


def dump_mapping(tree: Mapping[str, Any]) -> str:
    """Write keys and plain values as YAML, in their order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, width=100)
    return text


def read_yaml(path: Place) -> tuple[dict[str, Any], Origins]:
    """Return the tree of a YAML file and, for each key path, the origin of its value.

    Raises:
        UserError: it cannot be read, is no YAML, or holds anything but keys and values.
    """
    try:
        tree, origins = parse(_text_of(path), (), lambda line: f"{path}:{line}")
    except ValueError as error:
        raise UserError(f"{path}: is not YAML: {error}") from None
    if not isinstance(tree, dict):
        found = "but a list" if isinstance(tree, list) else "but one value"
        raise UserError(
            f"{path}: holds no mapping ({'it is empty' if tree is None else found})",
            remedy="expected keys such as name, data, outer",
        )
    return tree, origins


def _text_of(path: Place) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: is not UTF-8 text", remedy="give a YAML config file, or save it as UTF-8"
        ) from None
    except Exception as error:  # the file systems of URIs have errors of their own
        missing = "there is none" if isinstance(error, FileNotFoundError) else None
        reason = getattr(error, "strerror", None) or missing or reason_of(error)
        in_folder = "give a file: the config of a run is config.yaml in the run's folder"
        remedy = in_folder if isinstance(error, IsADirectoryError) else "give a config file"
        raise UserError(f"{path}: cannot be read ({reason})", remedy=remedy) from None


def parse(text: str, keys: KeyPath, place_of: Callable[[int], str]) -> tuple[Any, Origins]:
    """Return the value of a YAML text, and the origins of all in it under ``keys``, by line.

    Depth and size are bounded, since anchors and merge keys let a page of text stand for more
    values than a computer can hold.

    Raises:
        UserError: it holds a key twice.
        ValueError: it is no YAML, or too much.
    """
    node = _composed(text)
    if node is None:
        return None, {keys: Origin(place_of(1), "")}
    origins: Origins = {}
    twice: set[KeyPath] = set()
    with gathered() as mistakes:
        for count, (path, key_node, value) in enumerate(_walk(node, keys, node)):
            if len(path) - len(keys) > MAX_DEPTH or count > MAX_VALUES:
                most = f"{MAX_DEPTH} deep, or holds over {MAX_VALUES} values"
                raise ValueError(f"it is more than {most}")
            place, name = place_of(key_node.start_mark.line + 1), ".".join(path)
            if path in origins:
                if path[:-1] not in twice:
                    first = origins[path].place
                    mistakes.add(f"{place}: {name} is given twice (first at {first})", "keep one")
                twice.add(path)
            plain = isinstance(value, yaml.ScalarNode) and value.style is None
            origins[path] = Origin(place, value.value if plain else None)
    return _constructed(node), origins


def _walk(
    node: yaml.Node, keys: KeyPath, key_node: yaml.Node
) -> Iterator[tuple[KeyPath, yaml.Node, yaml.Node]]:
    """Yield each value in ``node`` and itself: its path, the node of its key, and its own."""
    yield keys, key_node, node
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _walk(item, (*keys, str(number)), item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: a key is a list or a section; keys are text")
            yield from _walk(value, (*keys, key.value), key)


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_syntax_problem(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error).replace('in "<unicode string>", ', "at ")) from None
    except RecursionError:
        raise ValueError(f"it is more than {MAX_DEPTH} deep") from None


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    """Return where a text is no YAML, why, and the remedy."""
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


def _constructed(node: yaml.Node) -> Any:
    """Return the values that nodes stand for; a ``ValueError`` names one that is no such value."""
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error)) from None
    except Exception as error:  # `!!int x`, `2021-13-45`, ...: whatever the conversion raises
        raise ValueError(f"a value is not of its kind ({reason_of(error)})") from None
