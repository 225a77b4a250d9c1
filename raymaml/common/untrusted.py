"""Checks of input that is not trusted: JSON, and names of files."""

from __future__ import annotations

import json
import math
import posixpath
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

Checked = TypeVar("Checked")
_LONGEST_REASON = 300


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON document; NaN and infinities are numbers.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested deeper than about 200 levels (for which the
            standard library raises a ``RecursionError``).
    """
    return from_json(data)


def json_ready(value: Any, *, strings: bool = False) -> Any:
    """Return ``value`` in the types of JSON.

    A number that is not finite becomes None, or with ``strings`` its name, from which a reader can
    restore the number: "Infinity", "-Infinity", "NaN".
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, strings=strings) for key, item in value.items()}
    if hasattr(value, "tolist"):  # of numpy
        return json_ready(value.tolist(), strings=strings)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_ready(item, strings=strings) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value) if strings else None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def json_text(value: Any, *, indent: int | None = None, strings: bool = False) -> str:
    """Return ``value`` as JSON, without the NaN and Infinity of Python's writer.

    ``json_ready`` replaces them.
    """
    return json.dumps(json_ready(value, strings=strings), indent=indent, allow_nan=False)


def checked(kind: TypeAdapter[Checked], tree: object) -> Checked:
    """Return ``tree`` as a value of ``kind``.

    Raises:
        ValueError: it is not one; with the first thing that is wrong.
    """
    try:
        return kind.validate_python(tree)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic finds, on one line of bounded length."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place, problem = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    return " ".join((f"{place}: {problem}" if place else problem).split())[:_LONGEST_REASON]


def shortened(value: object, length: int = 100) -> str:
    """Return a value as text for a message, cut to ``length`` characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
    return cut(text, length)


def cut(text: str, length: int) -> str:
    """Return a text, or the beginning of one that is longer than ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def stays_inside(name: str) -> bool:
    """Return whether a path in an archive or a list stays inside the folder that it is for."""
    is_plain = not any(char in name for char in "\\:\0")
    return is_plain and not f"{posixpath.normpath(name)}/".startswith(("/", "../"))
