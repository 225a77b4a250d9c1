"""The HTML report in a real browser: it renders, whole and inside the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_evaluation import record

from raymaml.config.model import ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import write_bank
from raymaml.data.bank_format import in_memory
from raymaml.data.contact_sheet import TEXT
from raymaml.evaluation.audit import AuditResult
from raymaml.evaluation.records import records_table
from raymaml.evaluation.results import ArmResult, Protocol
from raymaml.reports.write import write_report

TABLES_OUTSIDE = """
return [...document.querySelectorAll("table")].filter(box =>
  box.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  || (box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX != "auto")).length
"""
CUT = """
return [...document.querySelectorAll("table")].filter(table =>
  [table, ...table.querySelectorAll("th, td")].some(box => box.scrollWidth > box.clientWidth + 1)
).map(table => table.innerText.slice(0, 80))
"""
SHEETS = """
return [...document.images].filter(image => image.alt.startsWith("Episode"))
  .map(image => image.clientWidth / image.naturalWidth)
"""
FIRST_PICTURE_BEFORE_RESULTS = """
const results = [...document.querySelectorAll("h2")].find(each => each.innerText == "Results");
return document.images[0].compareDocumentPosition(results) & Node.DOCUMENT_POSITION_FOLLOWING
"""
EMPTY_IMAGES = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    names = [f"Alphabet_of_the_Magi/character_number_{number:02d}" for number in range(5)]
    bank = write_bank(
        folder / "bank",
        [in_memory(name, "test", images) for name in names],
        source="noise",
        licence="none",
        image_shape=(1, 28, 28),
    )
    rows = np.arange(20).reshape(5, 4)
    drawn = {"support_rows": tuple(rows[:, 0]), "query_rows": tuple(rows[:, 1:].ravel())}
    arms = []
    for name in ("a-model-with-a-long-name-that-does-not-break", *(f"norm=n{i}" for i in range(7))):
        steps = generator.integers(0, 16, (150, 11)) / 15
        taken = generator.integers(0, 5, (150, 15))
        table = records_table(
            [
                record(i, accuracy_by_step=tuple(row), query_predictions=tuple(taken[i]), **drawn)
                for i, row in enumerate(steps.tolist())
            ]
        )
        protocol = Protocol(
            spec=EpisodesConfig(num_episodes=1),
            model=ModelConfig(norm="context", head="zero"),
            num_steps=5,
            examination=None,
        )
        identity = {"weights": "0123456789abcdef" * 4, "model": "x" * 300}
        arms.append(
            ArmResult(
                name=name, description="d" * 90, protocol=protocol, records=table, identity=identity
            )
        )
    numbers = "numbers " * 20
    verdict = {"claim": "a claim " * 9, "outcome": "supported", "scope": "x", "numbers": numbers}
    audit = AuditResult(
        name="x", title="Audit", outcome="passed", sentence="s", rows=[{"a": 1, "b": "c" * 50}]
    )
    write_report(folder, arms, verdicts=[verdict], audits=[audit], title="Report", bank=bank)
    return folder / "report.html"


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_renders_and_fits(browser: Any, page: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.title == "Report"
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    assert browser.execute_script("return document.images.length") == 9
    assert browser.execute_script(EMPTY_IMAGES) == 0
    assert browser.execute_script("return innerWidth") == width
    root = "return document.documentElement"
    assert browser.execute_script(f"{root}.scrollWidth <= {root[7:]}.clientWidth")
    assert browser.execute_script("return document.querySelectorAll('table').length") == 10
    assert browser.execute_script(TABLES_OUTSIDE) == 0
    assert browser.execute_script(FIRST_PICTURE_BEFORE_RESULTS)
    scales = browser.execute_script(SHEETS)
    assert len(scales) == 3
    assert all(TEXT * scale >= 11 for scale in scales)  # letters of class names, pixels
    if width > 1000:
        assert browser.execute_script(CUT) == []


def test_the_report_prints(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(printed) > 100_000  # pictures are in it
