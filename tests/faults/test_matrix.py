"""The table of faults in README.md beside this file and the tests that inject them agree."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = {"goes on", "resumes", "stops"}


def rows() -> list[tuple[str, str, str]]:
    """Return fault, what happens and outcome of each row of the table."""
    page = (ROOT / "tests/faults/README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (.+?) \| (.+) \| (.+?) \|$", page, re.MULTILINE)
    return [row for row in found if row[0] not in {"fault", "---"}]


def injected() -> Counter[str]:
    """Count the tests marked with each fault: ``@pytest.mark.fault("name")``, or in ``marks=``."""
    names: Counter[str] = Counter()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                names[ast.literal_eval(node.args[0])] += 1
    return names


def test_every_row_is_a_test_and_every_fault_a_row() -> None:
    faults = [fault for fault, _, _ in rows()]
    assert len(faults) == len(set(faults)) >= 20
    assert set(injected()) == set(faults)


def test_every_outcome_is_one_of_three() -> None:
    assert {outcome for _, _, outcome in rows()} == OUTCOMES
