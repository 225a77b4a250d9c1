"""A report as a list of blocks, and how it reads as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from raymaml.storage.files import read_bytes
from raymaml.storage.place import Place


class Strong(str):
    """Text that stands out."""


class Code(str):
    """Text as a program writes it."""


@dataclass(frozen=True)
class Heading:
    """Opens a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text, or a ``Strong`` or ``Code`` one."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Pairs of a name and what it is."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells under a header; numbers stand to the right in all columns but the first ``left``."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Picture:
    """A file beside the page, and what it shows."""

    file: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Lay out a page as Markdown that GitHub shows well."""
    return "\n\n".join([f"# {_escaped(title)}", *map(_markdown, blocks)]) + "\n"


def html(title: str, blocks: Sequence[Block], folder: Place) -> str:
    """Lay out a page as one HTML file, with the pictures of ``folder`` inside it."""
    source = importlib.resources.files("raymaml.evaluation") / "report.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_uri"] = lambda name: _data_uri(folder / name)
    environment.tests["strong"] = lambda text: isinstance(text, Strong)
    environment.tests["code"] = lambda text: isinstance(text, Code)
    template = environment.from_string(source.read_text(encoding="utf-8"))
    named = [(type(block).__name__, block) for block in blocks]
    return template.render(title=title, blocks=named)


def _data_uri(path: Place) -> str:
    return f"data:image/png;base64,{base64.b64encode(read_bytes(path)).decode('ascii')}"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_escaped(text)}"
        case Paragraph(text):
            return _inline(text)
        case Bullets(items):
            return "\n".join(f"- **{_escaped(name)}**: {_inline(text)}" for name, text in items)
        case Picture(file, text):
            return f"![{_escaped(text)}]({file})"
        case Table(header, rows, left):
            align = [":--" if column < left else "--:" for column in range(len(header))]
            cells = [[_escaped(cell) for cell in header], align]
            # GitHub splits table cells at | before it looks for code.
            cells += [
                [
                    _inline(cell).replace("|", "\\|") if isinstance(cell, Code) else _inline(cell)
                    for cell in row
                ]
                for row in rows
            ]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _inline(text: str) -> str:
    if isinstance(text, Code):
        fence = "`` {} ``" if "`" in text else "`{}`"
        return fence.format(" ".join(text.split()) or " ")
    return f"**{_escaped(text)}**" if isinstance(text, Strong) else _escaped(text)


def _escaped(text: str) -> str:
    """Return ``text`` on one line, so that Markdown shows it as it is, in a table too."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
