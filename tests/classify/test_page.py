"""The page of ``raymaml predict``: whole, escaped, unsure pictures first; in a real browser too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers_predict import INDUCTIVE, config_file, draw, draw_classes, predict, rows_of, trained

from raymaml.classify.page import Tally, page

EMPTY_IMAGES = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
ORDER = """
return [...document.querySelectorAll(".predicted")].map(part =>
  [part.querySelector("h3").firstChild.textContent.trim(),
   [...part.querySelectorAll("meter")].map(meter => meter.value)])
"""
NASTY = "<img src=x onerror=alert(1)>&\"'.png"


def table(rows: list[tuple[str, float | None]]) -> pa.Table:
    """Rows of the classes a & b: path, and probability of a; None is a broken picture."""
    chances = [chance for _, chance in rows]
    others = [None if chance is None else 1 - chance for chance in chances]
    named = [None if chance is None else "ab"[chance < 0.5] for chance in chances]
    return pa.table(
        {
            "path": [path for path, _ in rows],
            "predicted": pa.array(named, pa.string()),
            "probability": pa.array(chances, pa.float32()),
            "error": pa.array([None if each is not None else "broken" for each in chances]),
            "p_a": pa.array(chances, pa.float32()),
            "p_b": pa.array(others, pa.float32()),
        }
    )


def test_the_least_sure_are_kept() -> None:
    tally = Tally(classes=["a", "b"], most_shown=3)
    tally.add(table([("x/0", 0.9), ("x/1", 0.6), ("x/2", None), ("x/3", 0.25)]))
    tally.add(table([("x/4", 0.125), ("x/5", 0.75), ("x/6", 1.0)]))
    assert (tally.num_rows, tally.num_errors) == (7, 1)
    assert dict(tally.counts) == {"a": 4, "b": 2}
    assert [(each.number, each.predicted) for each in tally.shown] == [(1, "a"), (3, "b"), (5, "a")]
    assert tally.errors == [("x/2", "broken")]
    text = page(tally, ["a line"], {}, lambda number: np.full((2, 2, 1), number, np.uint8))
    assert "The 3 least sure pictures are shown." in text
    assert text.index("60.0%") < text.index("75.0%")
    assert "else b, 40.0%" in text


@pytest.fixture
def made(
    make_config: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A page whose support set and pictures have names that are markup."""
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path)
    (tmp_path / "labelled" / "ant").rename(tmp_path / "labelled" / "<b>ant")
    draw(tmp_path / "new" / NASTY, 0, 77)
    (tmp_path / "new" / "<u>.png").write_text("text")
    config = trained(make_config, tmp_path_factory, *INDUCTIVE)
    arguments = ("--support", "labelled", "--images", "new", "--out", "found.csv")
    predict(config_file(config), *arguments, "--html", "page.html")
    return tmp_path / "page.html"


def test_the_page_needs_nothing_else_and_escapes_names(made: Path) -> None:
    text = made.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 6 + 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text
    assert "<b>ant" not in text
    assert "&lt;b&gt;ant" in text
    assert NASTY not in text
    assert "&lt;u&gt;.png</strong> is not a readable image (unknown format)" in text


def test_the_page_renders_and_fits(browser: Any, made: Path) -> None:
    found = [row for row in rows_of(made.with_name("found.csv")) if not row["error"]]
    for width in (360, 1280):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(made.as_uri())
        assert browser.title == "Predictions"
        assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
        assert browser.execute_script("return document.images.length") == 6 + 10
        assert browser.execute_script(EMPTY_IMAGES) == 0
        root = "return document.documentElement"
        assert browser.execute_script(f"{root}.scrollWidth <= {root[7:]}.clientWidth")
        parts = browser.execute_script(ORDER)
        assert [name for name, _ in parts] == sorted({row["predicted"] for row in found})
        for name, chances in parts:
            own = sorted(float(row["probability"]) for row in found if row["predicted"] == name)
            assert chances == pytest.approx(own)  # the least sure come first
