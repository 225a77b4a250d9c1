"""Metrics: a JSON line a row, whole after a kill, without rows of steps that are done again."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from raymaml.config.model import OuterConfig
from raymaml.training.metrics import (
    METRICS_FILE,
    RunMetrics,
    duration,
    progress_line,
    read_metrics,
)
from raymaml.training.state import Validation

MEANS = {"query_loss": 1.5, "query_accuracy": 0.25, "grad_norm": 2.0}


def writer(folder: Path) -> RunMetrics:
    return RunMetrics(folder, OuterConfig(num_steps=10, meta_batch_size=4), lambda _line: None)


def validation(step: int) -> Validation:
    return Validation(step=step, accuracy=0.75, ci95=0.125, loss=0.5)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read what TensorBoard shows: records of length, checksum, event, checksum."""
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("*events*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found |= {(each.tag, event.step): each.simple_value for each in event.summary.value}
            content = content[12 + length + 4 :]
    return found


def test_rows_lines_and_tensorboard_show_what_was_measured(tmp_path: Path) -> None:
    lines: list[str] = []
    rows: list[Mapping[str, Any]] = []
    outer = OuterConfig(num_steps=10, meta_batch_size=4)
    metrics = RunMetrics(tmp_path, outer, lines.append, rows.append)
    metrics.start(0)
    metrics.training(2, MEANS)
    metrics.validation(validation(2))
    assert rows == read_metrics(tmp_path / METRICS_FILE)
    train, val = rows
    assert val == {"step": 2, "val_accuracy": 0.75, "val_ci95": 0.125, "val_loss": 0.5}
    assert train["step"] == 2
    assert MEANS.items() <= train.items()
    # two steps of four episodes: 8 episodes; eight steps of four to go
    assert train["episodes_per_second"] * train["seconds_left"] == pytest.approx(8 * 4)
    assert len(lines) == 2
    assert "step  2/10  loss 1.5000  accuracy 25.00%" in lines[0]
    assert lines[1] == "step  2/10  validation accuracy 75.00 +- 12.50%  loss 0.5000"
    assert scalars(tmp_path / "tensorboard") == {
        (f"{group}/{key}", 2): np.float32(value)
        for group, row in zip(("train", "val"), rows, strict=True)
        for key, value in row.items()
        if key != "step"
    }


def test_rows_after_the_step_to_go_on_from_are_dropped(tmp_path: Path) -> None:
    first = writer(tmp_path)
    first.start(0)
    for step in (1, 2, 3):
        first.training(step, MEANS)
    first.validation(validation(3))
    second = writer(tmp_path)
    second.start(2)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]
    second.training(3, MEANS | {"query_loss": 7.0})
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["query_loss"] == 7.0


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "que')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    metrics = writer(tmp_path)
    metrics.start(5)
    metrics.validation(validation(6))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_progress_line_says_how_far_implicit_gradients_are_solved() -> None:
    row = {"step": 50, "query_loss": 1.5, "query_accuracy": 0.3, "episodes_per_second": 9.0}
    row |= {"seconds_left": 60.0, "cg_residual": 0.0321, "cg_curvature": 0.7}
    assert "30.00%  residual 0.032  9.0 episodes/s" in progress_line(row, 1000)
    advice = "residual 0.032  curvature -0.2: raise inner.proximal  9.0"
    assert advice in progress_line(row | {"cg_curvature": -0.2}, 1000)


def test_a_progress_line_says_rate_and_time_left() -> None:
    for seconds, text in {0: "0m00s", 59.6: "1m00s", 61: "1m01s", 3_660: "1h01m"}.items():
        assert duration(seconds) == text
    row = {
        **{"step": 50, "query_loss": 0.5, "query_accuracy": 0.875},
        **{"episodes_per_second": 12.34, "seconds_left": 90},
    }
    line = "step   50/1000  loss 0.5000  accuracy 87.50%  12.3 episodes/s  1m30s left"
    assert progress_line(row, 1000) == line
