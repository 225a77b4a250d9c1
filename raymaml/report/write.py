"""Writing a report: ``summary.json`` for programs, ``report.html`` and ``report.md`` for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from raymaml.common.untrusted import json_ready, json_text
from raymaml.data.bank import ImageBank
from raymaml.data.contact_sheet import episode_sheet
from raymaml.data.sampling import EpisodeRows
from raymaml.evaluation.audit import AuditResult
from raymaml.evaluation.campaign import Campaign
from raymaml.evaluation.records import RecordArrays, record_arrays
from raymaml.evaluation.results import ArmResult
from raymaml.evaluation.run_audit import read_audits
from raymaml.report import figures
from raymaml.report.content import content
from raymaml.report.document import picture, write_document
from raymaml.report.summary import PLUS_MINUS, Numbers, Trainings, summarize_arms
from raymaml.storage.files import on_disk, read_text, write_text
from raymaml.storage.place import Place
from raymaml.training.metrics import METRICS_FILE, read_metrics, write_tensorboard

_WORST = ("worst", "second worst", "third worst")
"""Episodes that are drawn."""


def write_test_report(campaign: Campaign) -> Place:
    """Write the report of a run's finished test; return the path of ``summary.json``."""
    main = campaign.arms[0]
    curve = read_metrics(main.run_folder / METRICS_FILE)
    path = write_report(
        campaign.folder,
        campaign.results(),
        title=f"{campaign.name}: test report",
        curve=[row for row in curve if "val_accuracy" in row],
        audits=read_audits(campaign),
        bank=main.bank,
    )
    show_in_tensorboard(path)
    return path


def write_report(
    folder: Place,
    arms: Sequence[ArmResult],
    *,
    title: str = "Test report",
    identity: Mapping[str, Any] | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    verdicts: Sequence[Mapping[str, Any]] = (),
    trainings: Trainings | None = None,
    audits: Sequence[AuditResult] = (),
    bank: ImageBank | None = None,
) -> Place:
    """Write the report of a campaign into ``folder`` and return the path of ``summary.json``.

    The first arm is the model; the others are compared with it. Each file is replaced whole:
    pictures, ``report.md``, ``report.html``, and ``summary.json`` last.

    Args:
        folder: receives the files.
        arms: the results.
        title: heading.
        identity: of the campaign; it precedes the identity of each arm.
        curve: the validation history, points of ``{"step", "val_accuracy"[, "val_ci95"]}``;
            without any there is no learning curve.
        verdicts: on the claims of a study: ``claim``, ``outcome``, ``scope``, ``numbers``, ``p``.
        trainings: the models that were trained more than once.
        audits: their outcomes.
        bank: draws the worst episodes; None leaves them out.

    Raises:
        ValueError: when there is no arm, or two have one name.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs arms with different names; got {names}")
    if identity:
        arms = [replace(arm, identity={**identity, **arm.identity}) for arm in arms]
    records = {arm.name: record_arrays(arm.records) for arm in arms}
    summary = {
        **summarize_arms(arms, records, trainings or {}),
        "verdicts": verdicts,
        "audits": [asdict(audit) for audit in audits],
    }
    pictures = _pictures(folder, records, summary["arms"], curve, bank)
    write_document(folder, "report", title, content(arms, summary, pictures))
    path = folder / "summary.json"
    write_text(path, json_text(summary, indent=2) + "\n")
    return path


def headline_of(path: Place) -> str:
    """Return the number and the protocol that a ``summary.json`` holds, and the page beside it."""
    summary = json.loads(read_text(path))
    text = summary["headline"].replace(PLUS_MINUS, "+-")
    return f"{text} (95% interval) | {summary['protocol']}; report: {path.parent / 'report.html'}"


def show_in_tensorboard(path: Place) -> None:
    """Show the numbers of each arm of a ``summary.json``, and the page beside it, in TensorBoard.

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
    page = read_text(path.parent / "report.md")
    step = int(digits[0]) if digits else 0
    write_tensorboard(path.parent / "tensorboard", scalars, {"test/report": page}, step)


def _pictures(
    folder: Place,
    records: Mapping[str, RecordArrays],
    arms: Mapping[str, Numbers],
    curve: Sequence[Mapping[str, Any]],
    bank: ImageBank | None,
) -> Iterator[str]:
    """Draw the pictures into ``folder``; yield the blocks that show them."""
    with on_disk(folder) as place:
        yield from _figures(place, records, arms)
        points = [point for point in json_ready(curve) if point.get("val_accuracy") is not None]
        if points:
            figures.learning_curve(place / "learning_curve.png", points)
            yield picture("learning_curve.png", "Validation accuracy over the outer steps")
        if bank is not None:
            yield from _worst_episodes(place, next(iter(records.values())), bank)


def _figures(
    folder: Path, records: Mapping[str, RecordArrays], arms: Mapping[str, Numbers]
) -> Iterator[str]:
    name, *others = records
    main = records[name]
    if others:
        figures.mean_accuracies(folder / "arms.png", arms)
        yield picture("arms.png", "Mean accuracy of the arms, with two intervals")
    file = "accuracy_distribution.png"
    figures.distribution(folder / file, main.accuracy, arms[name]["accuracy"])
    yield picture(file, f"Accuracy of the test episodes ({name})")
    accuracies = {arm: each.accuracy for arm, each in records.items()}
    figures.running_mean(folder / "running_mean.png", accuracies)
    text = "Mean accuracy over the first episodes, with its 95% interval"
    yield picture("running_mean.png", text)
    chance = 1 / main.class_ids.shape[1]
    figures.accuracy_by_step(folder / "accuracy_by_step.png", arms, chance)
    yield picture("accuracy_by_step.png", "Mean test accuracy after each inner step")
    figures.accuracy_by_confidence(folder / "calibration.png", arms)
    yield picture("calibration.png", "Accuracy of the queries by their confidence")


def _worst_episodes(folder: Path, records: RecordArrays, bank: ImageBank) -> Iterator[str]:
    places = worst_episodes(records, len(_WORST))
    for number, (at, word) in enumerate(zip(places, _WORST, strict=False), 1):
        rows = EpisodeRows(
            index=int(records.episode[at]),
            seed=0,
            classes=records.class_ids[at],
            support=records.support_rows[at],
            support_labels=records.support_labels[at],
            query=records.query_rows[at],
            query_labels=records.query_labels[at],
        )
        episode_sheet(bank, rows, folder / f"worst_{number}.png")
        text = f"Episode {rows.index}, the {word}: {records.accuracy[at]:.1%}"
        yield picture(f"worst_{number}.png", text)


def worst_episodes(records: RecordArrays, count: int) -> Sequence[int]:
    """Return the places of the worst episodes: lowest accuracy, then highest loss, first."""
    order: list[int] = np.lexsort((-records.loss, records.accuracy))[:count].tolist()
    return order
