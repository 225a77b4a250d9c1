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
    with Progress({"a": 4, "b": 2}, {"a": [], "b": []}, lines.append) as progress:
        progress.add("a", 2, [0.5, 1.0])
        progress.add("b", 2, [])  # left out: the arm was precise enough
        progress.add("a", 2, [0.75, 0.75])
    assert lines == [
        "2/6 episodes  0/2 arms done  a 75.00 +- 75.00% over 2  1.0 episodes/s  0m04s left",
        # of 4 episodes in all 2 are judged, in 4 s; what is left out is no work done
        "2/4 episodes  1/2 arms done  b - over 0  0.5 episodes/s  0m04s left",
        # 4 episodes in 6 s
        "4/4 episodes  2/2 arms done  a 75.00 +- 63.95% over 4  0.7 episodes/s  0m00s left",
    ]


def test_episodes_that_are_left_out_count_as_neither_judged_nor_missing() -> None:
    """4 recorded episodes showed an arm to be precise enough: 996 are left out, none judged."""
    lines: list[str] = []
    rows: list[Mapping[str, Any]] = []
    with Progress({"a": 1000}, {"a": [0.5, 1.0, 0.5, 1.0]}, lines.append, rows.append) as progress:
        progress.add("a", 500, [])
        progress.add("a", 496, [])
    assert [line.strip().split("  ")[0] for line in lines] == ["4/500 episodes", "4/4 episodes"]
    assert [line.split("  ")[-1] for line in lines] == ["? left", "0m00s left"]
    assert [row["episodes_per_second"] for row in rows] == [0.0, 0.0, 0.0]


def test_recorded_episodes_count_but_not_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    lines: list[str] = []
    rows: list[Mapping[str, Any]] = []
    recorded = {"a": [0.5, 1.0, 0.5, 1.0], "done": [0.5]}
    with Progress({"a": 8, "done": 1}, recorded, lines.append, rows.append) as progress:
        progress.add("a", 2, [0.5, 1.0])
    # 2 episodes in 2 s, 2 are left
    assert lines == [
        "7/9 episodes  1/2 arms done  a 75.00 +- 38.30% over 6  1.0 episodes/s  0m02s left"
    ]
    shown = [(row["arm"], row["episodes"], row["episodes_per_second"]) for row in rows]
    assert shown == [("a", 4, 0.0), ("done", 1, 0.0), ("a", 6, 1.0)]
    assert [row["accuracy"] for row in rows] == [0.75, 0.5, 0.75]
    assert 100 * rows[-1]["ci95"] == pytest.approx(38.30, abs=0.005)


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
