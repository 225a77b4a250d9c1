"""What raymaml writes as JSON is JSON: no NaN and no Infinity, which Python's own writer adds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymaml.common.untrusted import json_ready, json_text, parse_json
from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_audit import audit_run
from raymaml.evaluation.run_test import plan_test
from raymaml.reports.write import write_test_report
from raymaml.training.metrics import METRICS_FILE, RunMetrics, read_metrics
from raymaml.training.state import Validation
from raymaml.training.worker import train_locally


def no_constants(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_numbers_that_are_not_finite_are_null_or_their_name() -> None:
    value = {1: [math.inf, (-math.inf, 0.5)], "b": np.array([math.nan, 1.0]), "c": Path("d")}
    assert no_constants(json_text(value)) == {"1": [None, [None, 0.5]], "b": [None, 1.0], "c": "d"}
    assert json_ready((np.float64(0.5), np.int64(2), np.bool_(True))) == [0.5, 2, True]
    named = no_constants(json_text(value, strings=True))
    assert named == {"1": ["Infinity", ["-Infinity", 0.5]], "b": ["NaN", 1.0], "c": "d"}
    assert parse_json(json_text({"é": True, "n": 3})) == {"é": True, "n": 3}


@pytest.mark.slow
def test_every_json_file_of_a_run_is_json(make_config) -> None:
    """One validation and one test episode, where intervals and skew are not defined."""
    config = make_config(
        "run",
        "outer.num_steps=2",
        "outer.validate_every=1",
        "episodes.val.num_episodes=1",
        "episodes.test.num_episodes=1",
    )
    assert train_locally(config, lambda _: None)
    cpu = torch.device("cpu")
    campaign = judge_locally(lambda _: plan_test(config, cpu), config.cluster, lambda _: None)
    audit_run(config, lambda _: None)
    write_test_report(campaign)
    files = [path for path in config.run_folder.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert {"checkpoint.json", "metrics.jsonl", "summary.json", "audits.json", "run.json"} <= {
        path.name for path in files
    }
    for path in files:
        text = path.read_text(encoding="utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            no_constants(part)


def test_metrics_of_before_are_read_and_written_as_json(make_config, tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "val_accuracy": 0.5, "val_ci95": Infinity, "val_loss": NaN}\n')
    row = {"step": 1, "val_accuracy": 0.5, "val_ci95": None, "val_loss": None}
    assert read_metrics(path) == [row]
    writer = RunMetrics(tmp_path, make_config("run").outer, lambda _: None)
    writer.start(1)
    writer.validation(Validation(step=2, accuracy=0.5, ci95=math.inf, loss=1.0))
    rows = [no_constants(line) for line in path.read_text().splitlines()]
    assert rows == read_metrics(path)
    assert rows[0] == row
    assert rows[1]["val_ci95"] is None
