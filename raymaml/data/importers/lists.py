"""CSVs that list images, as spreadsheets and scripts write them; every wrong line is named."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import TypeVar

from raymaml.common.errors import Mistakes, UserError
from raymaml.data.importers.images import read_whole

MOST_BYTES = 512 << 20
"""Of a list, which is read whole."""
Key = TypeVar("Key")
Item = TypeVar("Item")


def read_csv(table: Path, name: str, remedy: str) -> list[list[str]]:
    """Return the rows of a CSV.

    Raises:
        UserError: it cannot be read; ``name`` begins the message and ``remedy`` ends it.
    """
    try:
        text = _text(read_whole(table, MOST_BYTES))
        first = text.partition("\n")[0]
        comma = next((mark for mark in ",;\t" if mark in first), ",")
        return list(csv.reader(StringIO(text, newline=""), delimiter=comma))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{table}:{line}: is not UTF-8 (byte {error.object[error.start]:#04x})",
            remedy='save the list as UTF-8, which spreadsheets offer as "CSV UTF-8"',
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{name} cannot be read ({error})", remedy=remedy) from None


def _text(data: bytes) -> str:
    """Decode a list: UTF-8, or UTF-16 where the file begins with its mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters; save it as UTF-8")
    return text


def by_class(
    table: Path,
    rows: Iterable[list[str]],
    parse: Callable[[list[str]], tuple[Key, Item]],
    mistakes: Mistakes,
    first_line: int = 2,
) -> dict[Key, list[Item]]:
    """Sort the images of a list by class.

    Args:
        table: the list, for messages.
        rows: its lines without a header; empty ones are skipped.
        parse: returns class and image of a line; raises ``ValueError`` where it is wrong.
        mistakes: takes those of all lines.
        first_line: number of the first row.
    """
    found: dict[Key, list[Item]] = {}
    seen: set[Item] = set()
    for number, row in enumerate(rows, first_line):
        try:
            if row:
                key, item = parse(row)
                if item in seen:
                    raise ValueError(f"{row[0]} is listed twice; an image may be in one class only")
                seen.add(item)
                found.setdefault(key, []).append(item)
        except ValueError as error:
            mistakes.append(f"{table}:{number}: {error}")
    return found
