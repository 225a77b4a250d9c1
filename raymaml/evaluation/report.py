"""What a campaign tells: ``summary.json`` for programs, ``report.md`` and pictures for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raymaml.config.model import ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.data.files import write_text
from raymaml.evaluation.markdown import report_page
from raymaml.evaluation.plots import (
    plot_accuracy_by_step,
    plot_distribution,
    plot_learning_curve,
)
from raymaml.evaluation.records import RecordArrays, record_arrays
from raymaml.evaluation.statistics import (
    ArmSummary,
    Interval,
    Summary,
    interval_by_step,
    summarize,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The records of one setting of a campaign."""

    name: str
    description: str
    """What was judged, one sentence."""
    records: pa.Table
    """As ``records.read_records`` returns them."""


def protocol_line(spec: EpisodesConfig, model: ModelConfig, num_steps: int) -> str:
    """Say in one line what decides an accuracy beside the weights.

    For example ``5-way 1-shot 15-query | transductive | 1 step | head zero | single model``.
    """
    return " | ".join(
        (
            f"{spec.num_ways}-way {spec.num_shots}-shot {spec.num_queries}-query",
            _norm_text(model),
            f"{num_steps} step" if num_steps == 1 else f"{num_steps} steps",
            f"head {model.head}",
            "single model",
        )
    )


def _norm_text(model: ModelConfig) -> str:
    """Name the norm; the reader of a number must be told whether it is inductive."""
    if model.norm == "transductive":
        return "transductive"
    kind = "transductive" if model.is_transductive else "inductive"
    return f"{kind} ({model.norm_text})"


def write_report(
    folder: Path,
    arms: Sequence[ArmResult],
    *,
    protocol: str,
    identity: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]] = (),
    title: str = "Test report",
) -> Path:
    """Write the report of a campaign into ``folder`` and return the path of ``summary.json``.

    The first arm is the model, the others are baselines shown beside it. ``curve`` is the
    validation history, points of ``{"step", "val_accuracy"[, "val_ci95"]}``; without any there is
    no learning curve. Each file is replaced whole, ``summary.json`` last.

    Raises:
        ValueError: when there is no arm, or two have one name.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs arms with different names; got {names}")
    arrays = [record_arrays(arm.records) for arm in arms]
    summaries = [_summarize(arm, found) for arm, found in zip(arms, arrays, strict=True)]
    summary = plain(_summary_json(summaries, protocol, identity))
    pictures = _draw(folder, arrays[0], summaries, curve)
    page = report_page(title, summaries, protocol, summary["identity"], pictures)
    write_text(folder / "report.md", page)
    path = folder / "summary.json"
    write_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def plain(value: Any) -> Any:
    """Return ``value`` in the types that JSON knows; what is not a finite number becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _summarize(arm: ArmResult, arrays: RecordArrays) -> ArmSummary:
    return ArmSummary(
        name=arm.name,
        description=arm.description,
        accuracy=summarize(arrays.accuracy),
        loss=summarize(arrays.loss),
        by_step=interval_by_step(arrays.accuracy_by_step),
    )


def _draw(
    folder: Path,
    main: RecordArrays,
    arms: Sequence[ArmSummary],
    curve: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Draw the pictures, the distribution of ``main``; return what each shows, by file name."""
    pictures = {
        "accuracy_distribution.png": f"Accuracy of the test episodes ({arms[0].name})",
        "accuracy_by_step.png": "Mean test accuracy after each inner step",
    }
    plot_distribution(folder / "accuracy_distribution.png", main.accuracy, arms[0].accuracy.overall)
    plot_accuracy_by_step(
        folder / "accuracy_by_step.png",
        {arm.name: arm.by_step for arm in arms},
        chance=1 / main.class_ids.shape[1],
    )
    points = [point for point in plain(curve) if point.get("val_accuracy") is not None]
    if points:
        pictures["learning_curve.png"] = "Validation accuracy over the outer steps"
        plot_learning_curve(folder / "learning_curve.png", points)
    return pictures


def _summary_json(
    arms: Sequence[ArmSummary], protocol: str, identity: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": protocol,
        **_arm_json(arms[0]),
        "arms": {arm.name: _arm_json(arm) for arm in arms},
        "identity": identity,
    }


def _arm_json(arm: ArmSummary) -> dict[str, Any]:
    return {
        "description": arm.description,
        "num_episodes": arm.accuracy.overall.count,
        "accuracy": _quantity_json(arm.accuracy),
        "loss": _quantity_json(arm.loss),
        "accuracy_by_step": [
            {"step": step, **_interval_json(interval)} for step, interval in enumerate(arm.by_step)
        ],
    }


def _quantity_json(summary: Summary) -> dict[str, Any]:
    return {
        **_interval_json(summary.overall),
        "first_600": _interval_json(summary.first),
        "quantiles": {f"{p:.0%}": value for p, value in summary.quantiles.items()},
        "num_nonfinite": summary.num_nonfinite,
    }


def _interval_json(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "ci95": interval.half_width,
        "interval95": [interval.low, interval.high],
        "std": interval.std,
        "num_episodes": interval.count,
    }
