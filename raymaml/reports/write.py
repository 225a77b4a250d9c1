"""Writing a report: ``summary.json`` for programs, ``report.html`` and ``report.md`` for people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
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
from raymaml.reports import figures
from raymaml.reports.content import content
from raymaml.reports.document import picture, write_document
from raymaml.reports.summary import PLUS_MINUS, Numbers, Trainings, summarize_arms
from raymaml.storage.files import on_disk, read_text, write_text
from raymaml.storage.place import Place
from raymaml.training.metrics import METRICS_FILE, read_metrics, write_tensorboard

_WORST = ("worst", "second worst", "third worst")
"""Episodes that are drawn."""


def write_test_report(campaign: Campaign) -> Place:
    """Write the report of a run's finished test; return the path of ``summary.json``."""
    main = campaign.arms[0]
    curve = read_metrics(main.config.run_folder / METRICS_FILE)
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
        bank: names the classes and draws the worst episodes; None leaves both out.

    Raises:
        ValueError: when there is no arm, or two have one name.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs arms with different names; got {names}")
    if identity:
        arms = [replace(arm, identity={**identity, **arm.identity}) for arm in arms]
    records = {arm.name: record_arrays(arm.records) for arm in arms}
    class_names = [] if bank is None else [each.name for each in bank.classes]
    summary = {
        **summarize_arms(arms, records, trainings or {}, class_names),
        "verdicts": verdicts,
        "audits": [asdict(audit) for audit in audits],
    }
    pictures = _pictures(folder, records, summary, curve, bank)
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
    summary: Numbers,
    curve: Sequence[Mapping[str, Any]],
    bank: ImageBank | None,
) -> Iterator[str]:
    """Draw the pictures into ``folder``; yield the blocks that show them."""
    with on_disk(folder) as place:
        for name, text, draw in _drawings(records, summary, curve, bank):
            draw(place / f"{name}.png")
            yield picture(f"{name}.png", text)


def _drawings(
    records: Mapping[str, RecordArrays],
    summary: Numbers,
    curve: Sequence[Mapping[str, Any]],
    bank: ImageBank | None,
) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Yield name and text of each picture, and a function that draws it into a file."""
    (name, main), *others = records.items()
    arms = summary["arms"]
    if others:
        text = "Mean accuracy of the arms, with two intervals"
        yield "arms", text, partial(figures.mean_accuracies, arms=arms)
    draw = partial(figures.distribution, accuracy=main.accuracy, mean=arms[name]["accuracy"])
    yield "accuracy_distribution", f"Accuracy of the test episodes ({name})", draw
    draw = partial(figures.running_mean, arms={arm: each.accuracy for arm, each in records.items()})
    yield "running_mean", "Mean accuracy over the first episodes, with its 95% interval", draw
    draw = partial(figures.accuracy_by_step, arms=arms, chance=1 / main.class_ids.shape[1])
    yield "accuracy_by_step", "Mean test accuracy after each inner step", draw
    draw = partial(figures.accuracy_by_confidence, arms=arms)
    yield "calibration", "Accuracy of the queries by their confidence", draw
    if points := [each for each in json_ready(curve) if each.get("val_accuracy") is not None]:
        draw = partial(figures.learning_curve, points=points)
        yield "learning_curve", "Validation accuracy over the outer steps", draw
    if bank is None:
        return
    draw = partial(figures.accuracy_by_class, classes=summary["classes"])
    yield "accuracy_by_class", f"Accuracy of the test classes ({name})", draw
    for number, place in enumerate(worst_episodes(main, len(_WORST))):
        rows = EpisodeRows(
            index=int(main.episode[place]),
            seed=0,
            classes=main.class_ids[place],
            support=main.support_rows[place],
            support_labels=main.support_labels[place],
            query=main.query_rows[place],
            query_labels=main.query_labels[place],
        )
        taken = main.query_predictions[place]
        known = taken if (taken >= 0).any() else None
        text = f"Episode {rows.index}, the {_WORST[number]}: {main.accuracy[place]:.1%}"
        yield f"worst_{number + 1}", text, partial(episode_sheet, bank, rows, predictions=known)


def worst_episodes(records: RecordArrays, count: int) -> Sequence[int]:
    """Return the places of the worst episodes: lowest accuracy, then highest loss, first."""
    order: list[int] = np.lexsort((-records.loss, records.accuracy))[:count].tolist()
    return order
