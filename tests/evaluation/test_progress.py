"""How far a campaign is: lines in a log, a table on a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from raymaml.evaluation.progress import Progress


def test_lines_hold_arms_means_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    lines: list[str] = []
    rows: list[Mapping[str, Any]] = []
    recorded = {"a": [0.5, 1.0, 0.5, 1.0], "b": []}
    with Progress({"a": 8, "b": 2}, recorded, lines.append, rows.append) as progress:
        progress.add("a", 2, [0.5, 1.0])
        progress.add("b", 2, [])  # left out: the arm was precise enough
        progress.add("a", 2, [0.75, 0.75])
    assert [line.strip() for line in lines] == [
        # what was recorded before counts, but not for the rate: 2 episodes in 2 s, 4 are left
        "6/10 episodes  0/2 arms done  a 75.00 +- 38.30% over 6  1.0 episodes/s  0m04s left",
        # of 8 episodes in all 6 are judged, 2 in 4 s; what is left out is no work done
        "6/8 episodes  1/2 arms done  b - over 0  0.5 episodes/s  0m04s left",
        # 4 episodes in 6 s
        "8/8 episodes  2/2 arms done  a 75.00 +- 24.65% over 8  0.7 episodes/s  0m00s left",
    ]
    shown = [(row["arm"], row["episodes"], row["episodes_per_second"]) for row in rows[:3]]
    assert shown == [("a", 4, 0.0), ("b", 0, 0.0), ("a", 6, 1.0)]
    assert rows[2]["accuracy"] == 0.75
    assert 100 * rows[2]["ci95"] == pytest.approx(38.30, abs=0.005)


def test_an_arm_that_was_precise_enough_before_has_no_rate() -> None:
    """4 recorded episodes showed it: 996 are left out, none judged."""
    lines: list[str] = []
    with Progress({"a": 1000}, {"a": [0.5, 1.0, 0.5, 1.0]}, lines.append) as progress:
        progress.add("a", 500, [])
        progress.add("a", 496, [])
    assert [line.strip().split("  ")[0] for line in lines] == ["4/500 episodes", "4/4 episodes"]
    assert [line.split("  ")[-1] for line in lines] == ["? left", "0m00s left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    recorded = {"one": [], "other": [1.0, 1.0, 1.0]}
    with Progress({"one": 2, "other": 4}, recorded, pytest.fail) as progress:
        first = terminal.getvalue()
        progress.add("one", 2, [0.5, 0.5])
    assert "0/2 arms done" in first
    assert "3/4" in first  # what is judged already is there from the beginning
    assert "100.00 +- 70.76%" in first
    shown = terminal.getvalue()
    assert "1/2 arms done" in shown
    assert "2/2" in shown
    assert "50.00 +- 42.09%" in shown
