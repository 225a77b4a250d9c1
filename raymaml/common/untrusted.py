"""What comes from outside is checked before it is believed: JSON, and names of files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

Checked = TypeVar("Checked")
_LONGEST_REASON = 300


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON document holds; NaN and infinities are numbers.

    Raises:
        ValueError: it is none, is no UTF-8, or is nested deeper than about 200 levels (which the
            standard library answers with a ``RecursionError``).
    """
    return from_json(data)


def json_ready(value: Any, *, strings: bool = False) -> Any:
    """Return ``value`` in the types that JSON knows.

    A number that is not finite becomes None, or with ``strings`` its name, which a reader that
    needs the number takes for it: "Infinity", "-Infinity", "NaN".
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
    """Return ``value`` as JSON, without the NaN and Infinity that Python writes and JSON lacks.

    See ``json_ready`` for what stands in their place.
    """
    return json.dumps(json_ready(value, strings=strings), indent=indent, allow_nan=False)


def checked(kind: TypeAdapter[Checked], tree: object) -> Checked:
    """Return ``tree`` as ``kind`` has it.

    Raises:
        ValueError: it is none; says what is wrong first.
    """
    try:
        return kind.validate_python(tree)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """Return the first thing that pydantic finds wrong, on one line of bounded length."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, detail["loc"]))
    text = " ".join(f"{place}: {detail['msg']}".split())
    return text[:_LONGEST_REASON]


def shortened(value: object, length: int = 100) -> str:
    """Return a value as messages show it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
    return cut(text, length)


def cut(text: str, length: int) -> str:
    """Return a text as it is, or its beginning where it is longer than so many characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def stays_inside(name: str) -> bool:
    """Whether a path, as archives and lists hold them, stays in the folder it is meant for."""
    if name.startswith("/") or any(char in name for char in "\\:\0"):
        return False
    depth = 0
    for part in name.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return False
    return True
