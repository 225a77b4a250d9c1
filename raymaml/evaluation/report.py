"""What a campaign tells: ``summary.json`` for programs, ``report.html`` (and .md) for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raymaml.common.untrusted import json_ready, json_text
from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ImageBank
from raymaml.data.contact_sheet import episode_sheet
from raymaml.data.sampling import EpisodeRows
from raymaml.evaluation import page, sections
from raymaml.evaluation.examination import Examination
from raymaml.evaluation.page import Picture
from raymaml.evaluation.plots import (
    PLUS_MINUS,
    plot_accuracy_by_step,
    plot_arms,
    plot_calibration,
    plot_distribution,
    plot_learning_curve,
    plot_running_mean,
)
from raymaml.evaluation.records import RecordArrays, record_arrays
from raymaml.evaluation.statistics import FIRST_EPISODES, Interval, Summary
from raymaml.evaluation.summary import (
    ArmSummary,
    Comparison,
    Replicated,
    Stopping,
    compare,
    replicated,
    running_mean,
    summarize_arm,
    worst_episodes,
)
from raymaml.evaluation.verdict import AuditResult, Verdict
from raymaml.storage.files import on_disk, read_text, write_text
from raymaml.storage.place import Place
from raymaml.training.metrics import write_tensorboard

SCHEMA_VERSION = 3
NOT_EXAMINED = "caution: not examined whether its logits follow their images"
NUM_WORST = 3
"""Episodes that are drawn."""
_ORDINALS = ("worst", "second worst", "third worst")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The records of one setting of a campaign."""

    name: str
    description: str
    """What was judged, one sentence."""
    protocol: str
    """Its ``protocol_line``."""
    records: pa.Table
    """As ``records.read_records`` returns them."""
    identity: Mapping[str, Any]
    """What decides the records: weights, model, episodes, versions, ..."""
    stopping: Stopping | None = None
    """How the number of episodes was decided by what was seen."""
    circumstances: Sequence[Mapping[str, str]] = ()
    """Of the chunks, as ``records.read_circumstances`` returns them: hardware, hashes, ..."""


def protocol_line(
    spec: EpisodesConfig, model: ModelConfig, num_steps: int, examination: Examination | None
) -> str:
    """Say in one line what decides an accuracy beside the weights.

    For example ``5-way 1-shot 15-query | transductive | 1 step | head zero | single model``.
    A fault that the examination found comes last: ``caution: its logits do not follow...``. A
    campaign may add that the bank is another one than in training, or that the encoder was edited.
    """
    caution = NOT_EXAMINED if examination is None else examination.caution
    parts = (
        f"{spec.num_ways}-way {spec.num_shots}-shot {spec.num_queries}-query",
        _norm_text(model, examination),
        f"{num_steps} step" if num_steps == 1 else f"{num_steps} steps",
        f"head {model.head}",
        "single model",
        caution,
    )
    return " | ".join(part for part in parts if part)


def _norm_text(model: ModelConfig, examination: Examination | None) -> str:
    """Name the norm; the reader of a number needs to know whether it is inductive.

    An encoder of raymaml is inductive by its norm, which tests prove, unless the examination says
    otherwise. Any other is so only where it was measured: it may do with a batch what it likes.
    """
    if model.norm == "transductive":
        return "transductive"
    if model.is_transductive:
        return f"transductive ({model.norm_text})"
    measured = None if examination is None else examination.is_inductive
    if model.encoder in ENCODERS and measured is not False:
        return f"inductive ({model.norm_text})"
    if examination is None or measured is None:
        return f"not known to be inductive ({model.norm_text})"
    kind = "inductive" if measured else "transductive"
    return f"{kind}, measured on {examination.episodes} episodes ({model.norm_text})"


def write_report(
    folder: Place,
    arms: Sequence[ArmResult],
    *,
    identity: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]] = (),
    verdicts: Sequence[Verdict] = (),
    trainings: Mapping[str, Mapping[int, str]] | None = None,
    audits: Sequence[AuditResult] = (),
    bank: ImageBank | None = None,
    title: str = "Test report",
) -> Place:
    """Write the report of a campaign into ``folder`` and return the path of ``summary.json``.

    The first arm is the model, the others are shown beside it and compared with it. Each file is
    replaced whole: pictures, ``report.md``, ``report.html``, and ``summary.json`` last.

    Args:
        arms: what was judged.
        identity: what the campaign is, shown before what decides the records of the arms.
        curve: the validation history, points of ``{"step", "val_accuracy"[, "val_ci95"]}``;
            without any there is no learning curve.
        verdicts: what became of claims.
        trainings: names of the arms that are trainings of one model, by seed, under one name.
        audits: what audits found.
        bank: draws the worst episodes; None leaves them out.
        title: heading.

    Raises:
        ValueError: when there is no arm, or two have one name.
    """
    _require_different_names([arm.name for arm in arms])
    records = {arm.name: record_arrays(arm.records) for arm in arms}
    summaries = [_summarized(arm, records[arm.name]) for arm in arms]
    compared = compare(records, trainings or {})
    over_trainings = replicated(trainings or {}, summaries)
    identities = [json_ready({**identity, **arm.identity}) for arm in arms]
    with on_disk(folder) as place:
        drawn = _draw(place, records, summaries, curve)
        drawn += _draw_worst(place, records[arms[0].name], bank) if bank is not None else []
    blocks = [
        *sections.head(summaries, verdicts),
        *sections.results(summaries),
        *sections.trainings(over_trainings),
        *sections.comparisons(compared),
        *sections.pictures(drawn),
        *sections.audits(audits),
        *sections.tail(summaries, identities, _circumstances(arms)),
    ]
    write_text(folder / "report.md", page.markdown(title, blocks))
    write_text(folder / "report.html", page.html(title, blocks, folder))
    path = folder / "summary.json"
    summary = {
        **_summary_json(summaries, compared, identities, over_trainings),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "audits": [asdict(audit) for audit in audits],
        "circumstances": {arm.name: arm.circumstances for arm in arms},
    }
    write_text(path, json_text(summary, indent=2) + "\n")
    return path


def _require_different_names(names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs arms with different names; got {names}")


def _summarized(arm: ArmResult, records: RecordArrays) -> ArmSummary:
    return summarize_arm(arm.name, arm.description, arm.protocol, records, arm.stopping)


def headline_of(path: Place) -> str:
    """Return, given a report's ``summary.json``, its number and protocol, and where its page is."""
    summary = json.loads(read_text(path))
    text = summary["headline"].replace(PLUS_MINUS, "+-")
    return f"{text} (95% interval) | {summary['protocol']}; report: {path.parent / 'report.html'}"


def show_in_tensorboard(path: Place) -> None:
    """Show a report, given its ``summary.json``, in TensorBoard: numbers of each arm, and the page.

    The step is that of the checkpoint, 0 for initial weights.
    """
    summary = json.loads(read_text(path))
    scalars = {
        f"test/{name}/{key}": value
        for name, arm in summary["arms"].items()
        for key, value in (
            ("accuracy", arm["accuracy"]["mean"]),
            ("accuracy_ci95", arm["accuracy"]["ci95"]),
            ("loss", arm["loss"]["mean"]),
            ("calibration_error", arm["calibration"]["error"]),
        )
        if value is not None
    }
    digits = re.search(r"\d+$", str(summary["identity"].get("checkpoint", "")))
    page_text = read_text(path.parent / "report.md")
    step = int(digits[0]) if digits else 0
    write_tensorboard(path.parent / "tensorboard", scalars, {"test/report": page_text}, step)


def _circumstances(arms: Sequence[ArmResult]) -> list[tuple[str, str]]:
    """Return what is told of the chunks: an entry for each different value of any arm."""
    return sorted(
        {
            (key if key == "hardware" else f"{arm.name}: {key}", value)
            for arm in arms
            for found in arm.circumstances
            for key, value in found.items()
        }
    )


def _draw(
    folder: Path,
    records: Mapping[str, RecordArrays],
    arms: Sequence[ArmSummary],
    curve: Sequence[Mapping[str, Any]],
) -> list[Picture]:
    """Draw the pictures; return what each shows."""
    main = records[arms[0].name]
    shown = [
        Picture("accuracy_distribution.png", f"Accuracy of the test episodes ({arms[0].name})"),
        Picture("running_mean.png", "Mean accuracy over the first episodes, with its 95% interval"),
        Picture("accuracy_by_step.png", "Mean test accuracy after each inner step"),
        Picture("calibration.png", "Accuracy of the queries by their confidence"),
    ]
    plot_distribution(folder / shown[0].file, main.accuracy, arms[0].accuracy.overall)
    plot_running_mean(
        folder / shown[1].file,
        {name: running_mean(found.accuracy) for name, found in records.items()},
        FIRST_EPISODES,
    )
    plot_accuracy_by_step(
        folder / shown[2].file,
        {arm.name: arm.by_step for arm in arms},
        chance=1 / main.class_ids.shape[1],
    )
    plot_calibration(folder / shown[3].file, {arm.name: arm.calibration for arm in arms})
    if len(arms) > 1:
        shown.insert(0, Picture("arms.png", "Mean accuracy of the arms, with two intervals"))
        plot_arms(
            folder / "arms.png",
            {arm.name: (arm.accuracy.overall, arm.new_classes) for arm in arms},
        )
    points = [point for point in json_ready(curve) if point.get("val_accuracy") is not None]
    if points:
        shown.append(Picture("learning_curve.png", "Validation accuracy over the outer steps"))
        plot_learning_curve(folder / shown[-1].file, points)
    return shown


def _draw_worst(folder: Path, records: RecordArrays, bank: ImageBank) -> list[Picture]:
    """Draw the episodes that went worst as contact sheets."""
    shown = []
    for number, at in enumerate(worst_episodes(records, NUM_WORST), 1):
        index = int(records.episode[at])
        rows = EpisodeRows(
            index=index,
            seed=0,
            classes=records.class_ids[at],
            support=records.support_rows[at],
            support_labels=records.support_labels[at],
            query=records.query_rows[at],
            query_labels=records.query_labels[at],
        )
        text = f"Episode {index}, the {_ORDINALS[number - 1]}: {records.accuracy[at]:.1%}"
        shown.append(Picture(f"worst_{number}.png", text))
        episode_sheet(bank, rows, folder / shown[-1].file)
    return shown


def _summary_json(
    arms: Sequence[ArmSummary],
    compared: Sequence[Comparison],
    identities: Sequence[Mapping[str, Any]],
    trainings: Mapping[str, Replicated],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": sections.headline(arms),
        **_arm_json(arms[0], identities[0]),
        "arms": {
            arm.name: _arm_json(arm, identity)
            for arm, identity in zip(arms, identities, strict=True)
        },
        "trainings": {arm: _trainings_json(each) for arm, each in trainings.items()},
        "comparisons": [_comparison_json(each) for each in compared],
    }


def _arm_json(arm: ArmSummary, identity: Mapping[str, Any]) -> dict[str, Any]:
    steps = zip(arm.by_step, arm.loss_by_step, strict=True)
    return {
        "description": arm.description,
        "protocol": arm.protocol,
        "num_episodes": arm.accuracy.overall.count,
        "stopping": None if arm.stopping is None else _stopping_json(arm, arm.stopping),
        "accuracy": {
            **_quantity_json(arm.accuracy),
            "any_look": _interval_json(arm.any_look),
            "new_classes": _interval_json(arm.new_classes, "num_classes"),
            "image_disjoint_tasks": _interval_json(arm.disjoint_tasks),
            "skew": arm.skew,
            "worst_1%": arm.worst,
        },
        "loss": _quantity_json(arm.loss),
        "brier": _quantity_json(arm.brier),
        "calibration": asdict(arm.calibration),
        "accuracy_by_step": [
            {"step": step, **_interval_json(accuracy), "loss": loss.mean}
            for step, (accuracy, loss) in enumerate(steps)
        ],
        "seconds": {"median": arm.seconds, "total": arm.total_seconds},
        "identity": identity,
    }


def _trainings_json(replicated: Replicated) -> dict[str, Any]:
    return {
        "arms": replicated.arms,
        "accuracy": _interval_json(replicated.accuracy, "num_trainings"),
        "ci95_over_episodes": replicated.over_episodes,
    }


def _stopping_json(arm: ArmSummary, stopping: Stopping) -> dict[str, Any]:
    count = arm.accuracy.overall.count
    return {
        **asdict(stopping),
        "stopped_early": count < stopping.most_episodes,
        "text": stopping.sentence(count),
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    found = {"arm": comparison.arm, "minus": comparison.minus}
    if comparison.result is None:
        return {**found, "refusal": comparison.refusal}
    result = asdict(comparison.result)
    intervals = {
        "difference": _interval_json(comparison.result.difference),
        "new_classes": _interval_json(comparison.result.new_classes, "num_classes"),
    }
    enough = {"allows_a_verdict": comparison.result.allows_a_verdict}
    return {**found, **result, **intervals, "holm_p": comparison.adjusted_p, **enough}


def _quantity_json(summary: Summary) -> dict[str, Any]:
    return {
        **_interval_json(summary.overall),
        "first_600": _interval_json(summary.first),
        "quantiles": {f"{p:.0%}": value for p, value in summary.quantiles.items()},
        "num_nonfinite": summary.num_nonfinite,
    }


def _interval_json(interval: Interval, counted: str = "num_episodes") -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "ci95": interval.half_width,
        "interval95": [interval.low, interval.high],
        "std": interval.std,
        counted: interval.count,
    }
