"""The end of a sweep: a page with a table of trials, and the best checkpoint as a run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from raymaml.common.errors import UserError
from raymaml.common.untrusted import checked, json_text, parse_json
from raymaml.config.load import dump_config
from raymaml.evaluation.campaign import Echo
from raymaml.experiments.journal import Journal, Report
from raymaml.experiments.sweep import Sweep, run_name
from raymaml.reports.document import (
    bullets,
    code,
    heading,
    paragraph,
    strong,
    table,
    write_document,
)
from raymaml.storage.files import exists, new_folder, read_bytes, rename_folder, write_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CARD, checkpoint_path, read_card
from raymaml.training.identity import IDENTITY
from raymaml.training.metrics import METRICS_FILE
from raymaml.training.origin import trained_config

SCHEMA_VERSION = 2
BEST = "best"
_FROM = "from.json"
"""The report that an export is the checkpoint of; at a URI the export is whole once it is there."""
_REPORT = TypeAdapter(Report)


def write_sweep_report(sweep: Sweep, journal: Journal, echo: Echo) -> Place:
    """Write ``sweep.json``, ``sweep.md`` and ``sweep.html``; export the best checkpoint.

    Returns:
        The path of ``sweep.json``.

    Raises:
        UserError: no trial has an accuracy.
    """
    folder, rows = sweep.folder, trial_rows(sweep, journal)
    best = journal.best(rows[0]["trial"])
    if best is None:
        problems = [f"trial {row['trial']}: {row['problem']}" for row in rows if row["problem"]]
        raise UserError(f"{folder}: no trial came to a validation", *problems)
    config_path = export_best(sweep, best)
    counts = Counter(row["status"] for row in rows)
    count = ", ".join(f"{number} {status}" for status, number in counts.items())
    write_document(folder, "sweep", sweep.settings.title, page_blocks(sweep, rows, best, count))
    content = {
        "schema_version": SCHEMA_VERSION,
        "sweep": sweep.settings.model_dump(mode="json"),
        "best": asdict(best),
        "trials": [row | {"best": row["best"] and asdict(row["best"])} for row in rows],
    }
    write_text(folder / "sweep.json", json_text(content, indent=2) + "\n")
    echo(f"{folder}: {count}; the best is {run_name(best.trial)}, {best.text}")
    echo(f"judge it by: raymaml test {config_path}")
    return folder / "sweep.json"


def trial_rows(sweep: Sweep, journal: Journal) -> list[dict[str, Any]]:
    """Return the trials by accuracy, the best first; those without one stand last.

    ``steps`` are the outer steps at the last validation, ``best`` is a ``Report`` or None.
    """
    rows: list[dict[str, Any]] = [
        {
            "trial": trial,
            "status": journal.status(
                trial, values.get("outer.num_steps", sweep.base.outer.num_steps)
            ),
            "steps": max((report.step for report in journal.of(trial)), default=0),
            "best": journal.best(trial),
            "values": values,
            "problem": journal.failures.get(trial),
        }
        for trial, values in sorted(journal.values.items())[: sweep.settings.count]
    ]
    return sorted(rows, key=lambda row: -row["best"].accuracy if row["best"] else 1.0)


def page_blocks(
    sweep: Sweep, rows: Sequence[Mapping[str, Any]], best: Report, count: str
) -> list[str]:
    """Return the blocks of the page."""
    settings = sweep.settings
    options = settings.scheduler.model_dump(exclude_none=True)
    taken, steps = sum(row["steps"] for row in rows), sweep.max_steps * len(rows)
    run = f"{run_name(best.trial)} before outer step {best.step}"
    facts = {
        "search": f"{settings.search}, seed {settings.seed}",
        "scheduler": ", ".join(f"{key} {value}" for key, value in options.items()),
        "trials": count,
        "outer steps": f"{taken:,} of {steps:,} that all trials take without an early end",
    }
    cells = [
        {
            **{key: str(row[key]) for key in ("trial", "status", "steps")},
            "best validation accuracy": row["best"].text if row["best"] else "-",
            **{key: str(row["values"][key]) for key in settings.space},
        }
        for row in rows
    ]
    failed = [(run_name(row["trial"]), row["problem"]) for row in rows if row["problem"]]
    return [
        paragraph(strong(f"{best.text} on the validation episodes by {run}")),
        paragraph(
            "The interval (95%) is over the validation episodes of that one trial. The best of many"
            " trials looks better than it is: judge it on the test episodes."
        ),
        paragraph(code(f"raymaml test {sweep.folder / BEST / 'config.yaml'}")),
        bullets(facts.items()),
        heading("Trials"),
        table(cells, left=2),
        *([heading("Failed"), bullets(failed)] if failed else []),
    ]


def export_best(sweep: Sweep, best: Report) -> Place:
    """Make ``best/``, a run folder with the best checkpoint alone, and return its config's path.

    An export of another checkpoint is moved aside, since it may have been judged.
    """
    folder, run = sweep.folder / BEST, sweep.folder / run_name(best.trial)
    before = _exported(folder)
    if before == best:
        return folder / "config.yaml"
    if exists(folder):
        whose = f"{run_name(before.trial)}-at-{before.step}" if before else "incomplete"
        aside = folder.with_name(f"best-was-{whose}")
        while exists(aside):
            aside = aside.with_name(f"{aside.name}-again")
        rename_folder(folder, aside.name, _FROM)
    source = checkpoint_path(run, best.step)
    config = trained_config(source)
    evaluation = config.evaluation.model_copy(update={"checkpoint": "best"})
    places = {key: getattr(sweep.base.data, key) for key in ("source", "bank", "shards", "cache")}
    data = config.data.model_copy(update=places)
    own = {"name": BEST, "run_dir": sweep.folder, "evaluation": evaluation, "data": data}
    files = [f"{source.name}/{name}" for name in (*read_card(source).files, CARD)]
    files += [name for name in (METRICS_FILE, IDENTITY) if exists(run / name)]
    with new_folder(folder, _FROM) as partial:
        (partial / source.name).mkdir()
        for name in files:
            (partial / name).write_bytes(read_bytes(run / name))
        write_text(partial / "config.yaml", dump_config(config.model_copy(update=own)))
        write_text(partial / _FROM, json_text(asdict(best), indent=2, strings=True) + "\n")
    return folder / "config.yaml"


def _exported(folder: Place) -> Report | None:
    """Return the report that an export is the checkpoint of; None where there is no whole one."""
    try:
        return checked(_REPORT, parse_json(read_bytes(folder / _FROM)))
    except (OSError, ValueError):
        return None
