"""Text reads as it is written, in the Markdown document and in the HTML file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raymaml.reports.document import (
    bullets,
    code,
    heading,
    paragraph,
    picture,
    strong,
    table,
    write_document,
)

HOSTILE = [
    '<script>alert("x")</script>',
    "</table></main><img src=x onerror=alert(1)>",
    "<!-- a --> &lt;b&gt; &amp; &#35;",
    "a|b `c`\n*d* _e_ ~~f~~ $\\no$ [g]\\",
    "[h](javascript:i) ![j](k.png) <https://l>",
    "`` m ` n | o \\| p",
    "# q #",
    "- r",
    "+ s",
    "12. t",
    "3) u",
    "> v",
    "--- w",
    "***",
    "\\",
    "`",
]
"""Names with HTML and Markdown in them."""
FRAME = {"html", "head", "title", "style", "body", "main"}


class Texts(HTMLParser):
    """The text of each element of the page, by its tag; every tag and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.attributes: set[str] = set()
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in (*FRAME, "meta", "img"):
            self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "img"):
            self._open.append((tag, []))

    def handle_data(self, data: str) -> None:
        for _, texts in self._open:
            texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        opened, texts = self._open.pop()
        assert opened == tag
        self.found.append((tag, "".join(texts)))


@pytest.mark.parametrize("text", HOSTILE)
def test_every_text_reads_as_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    blocks = [
        heading(text),
        paragraph(text),
        paragraph(strong(text)),
        paragraph(code(text)),
        bullets([(text, text), (text, code(text))]),
        table([{text: text, "number": code(text)}, {text: strong(text), "number": text}]),
        picture("a.png", text),
    ]
    write_document(tmp_path, "page", text, blocks)
    texts = Texts()
    texts.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    line = " ".join(text.split())
    blocks_and_marks = "h1 h2 p strong code ul li table thead tbody tr th td em"
    assert {tag for tag, _ in texts.found} - FRAME == set(blocks_and_marks.split())
    assert texts.attributes == {"style", "tabindex"}
    for tag, count in {"h1": 1, "h2": 1, "strong": 4, "code": 3, "em": 1, "td": 4}.items():
        assert [found for at, found in texts.found if at == tag] == [line] * count, tag
    assert [found for at, found in texts.found if at == "p"][:3] == [line] * 3
    assert [found for at, found in texts.found if at == "li"] == [f"{line}: {line}"] * 2
    assert [found for at, found in texts.found if at == "th"] == [line, "number"]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_row_of_a_table_has_as_many_cells(text: str) -> None:
    lines = table([{text: text, "b": code(text)}, {text: strong(text), "b": ""}]).splitlines()
    assert len(lines) == 4
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {4}
