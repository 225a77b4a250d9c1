"""A page of text, tables and pictures: one Markdown document, and one HTML file made from it.

Each block is a piece of Markdown. Text that enters a block is escaped: a name with Markdown or HTML
in it reads as it is written, in both files.
"""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence

import jinja2
from markdown_it import MarkdownIt

from raymaml.storage.files import read_bytes, write_text
from raymaml.storage.place import Place

_MARKUP = re.compile(r"[\\`*_\[\]<>|&~$#]")
_OPENS_A_LIST = re.compile(r"^(\d*)([-+.)])")


class Markdown(str):
    """Text that is Markdown already, so that it is not escaped."""


class Code(Markdown):
    """A span of code, in which Markdown knows no escapes."""


def strong(text: str) -> Markdown:
    """Return ``text`` in bold."""
    return Markdown(f"**{escaped(text)}**")


def code(text: str) -> Code:
    """Return ``text`` as a program writes it."""
    line = " ".join(text.split()) or " "
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return Code(f"{fence} {line} {fence}" if longest else f"`{line}`")


def escaped(text: str) -> str:
    """Return ``text`` on one line, so that Markdown shows it as it is."""
    if isinstance(text, Markdown):
        return text
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"## {escaped(text)}"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return _OPENS_A_LIST.sub(r"\1\\\2", escaped(text))


def bullets(items: Iterable[tuple[str, str]]) -> str:
    """Return a list of names, each with its text."""
    return "\n".join(f"- {strong(name)}: {escaped(text)}" for name, text in items)


def table(rows: Sequence[Mapping[str, str]], left: int = 1) -> str:
    """Return a table of rows that map column names to cells.

    The first ``left`` columns are text, the others numbers.
    """
    align = [":--" if column < left else "--:" for column in range(len(rows[0]))]
    header = [_cell(name) for name in rows[0]]
    cells = [[_cell(row[name]) for name in rows[0]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, align, *cells))


def _cell(text: str) -> str:
    # Markdown splits a row at | before it looks for code.
    return text.replace("|", "\\|") if isinstance(text, Code) else escaped(text)


def picture(file: str, text: str) -> str:
    """Return a picture, a file beside the document, with ``text`` under it."""
    return f"![{escaped(text)}]({file})\n*{escaped(text)}*"


def write_document(folder: Place, name: str, title: str, blocks: Iterable[str]) -> None:
    """Write ``<name>.md`` and ``<name>.html`` into ``folder``, where the pictures are.

    The HTML file has the pictures inside, and needs no other file.
    """
    text = "\n\n".join([f"# {escaped(title)}", *blocks]) + "\n"
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.html", _html(folder, title, text))


def _html(folder: Place, title: str, text: str) -> str:
    parser = MarkdownIt("js-default")  # HTML inside of Markdown is text
    tokens = parser.parse(text)
    for token in tokens:
        if token.type == "table_open":
            token.attrSet("tabindex", "0")  # a wide one scrolls by keys
        for child in token.children or ():
            if child.type == "image":
                data = base64.b64encode(read_bytes(folder / str(child.attrGet("src"))))
                child.attrSet("src", f"data:image/png;base64,{data.decode('ascii')}")
    body = parser.renderer.render(tokens, parser.options, {})
    return rendered("raymaml.reports", "page.html.jinja", title=title, body=body)


def rendered(package: str, template: str, **values: object) -> str:
    """Return a page made from a template that lies in ``package``; text in it is escaped."""
    source = importlib.resources.files(package) / template
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source.read_text(encoding="utf-8")).render(values)
