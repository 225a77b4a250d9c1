"""How many inputs each reader gets: a few fixed ones always, or as many as ``--fuzz-inputs`` says.

With ``--nightly`` there are hundreds more, other ones each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_fuzz import Fuzz, inputs_of, make_root

FEW, MANY = 15, 300


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--fuzz-inputs")
        tiers = [FEW, pytest.param(MANY, marks=pytest.mark.nightly)] if wanted is None else [wanted]
        metafunc.parametrize("fuzz", tiers, indirect=True)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fuzz]:
    """``fuzz(cases, read)`` feeds a reader; files go into ``fuzz.place``."""
    there = Path.cwd()
    root = make_root(tmp_path)
    os.chdir(root)
    one = Fuzz(root, request.param, **inputs_of(request))
    yield one
    os.chdir(there)
    if request.config.getoption("--fuzz-inputs") is not None:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(one.outcomes.items()))
        request.node.add_report_section("teardown", "fuzz", f"{request.node.name}: {counts}")
        request.config.stash.setdefault(COUNTS, []).append(f"{request.node.name}: {counts}")


COUNTS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(COUNTS, []):
        terminalreporter.write_line(line)
