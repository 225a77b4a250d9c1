"""The end of a sweep: table, plot and pages, and the best checkpoint as a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from raymaml.common.errors import UserError
from raymaml.common.untrusted import checked, json_text, parse_json
from raymaml.config.load import dump_config
from raymaml.evaluation.campaign import Echo
from raymaml.evaluation.parallel import plot_parallel
from raymaml.evaluation.population import Exploit
from raymaml.evaluation.referee import Referee, Report
from raymaml.evaluation.sweep import Sweep, max_steps
from raymaml.evaluation.sweep_table import TrialRow, accuracy_text, count_text, ranked, trial_rows
from raymaml.report.document import (
    bullets,
    code,
    heading,
    paragraph,
    picture,
    strong,
    table,
    write_document,
)
from raymaml.storage.files import exists, new_folder, read_bytes, rename_folder, write_text
from raymaml.storage.place import Place
from raymaml.training.card import LINEAGE_FILE
from raymaml.training.checkpoint import checkpoint_path, copy_checkpoint, trained_config
from raymaml.training.identity import IDENTITY
from raymaml.training.metrics import METRICS_FILE

SCHEMA_VERSION = 1
BEST = "best"
PICTURE = "parallel_coordinates.png"
_FROM = "from.json"
"""The report that an export is the checkpoint of; at a URI the export is whole once it is there."""
_REPORT = TypeAdapter(Report)


def write_sweep_report(
    sweep: Sweep, referee: Referee, exploits: Sequence[Exploit], echo: Echo
) -> Place:
    """Write ``sweep.json``, ``sweep.md``, ``sweep.html`` and the plot; export the best checkpoint.

    Returns:
        The path of ``sweep.json``.

    Raises:
        UserError: no trial has an accuracy.
    """
    rows = trial_rows(sweep, referee, exploits)
    best = referee.best(len(sweep.trials))
    if best is None:
        problems = [f"{row.run}: {row.problem}" for row in rows if row.problem]
        raise UserError(f"{sweep.folder}: no trial came to a validation", *dict.fromkeys(problems))
    config_path = export_best(sweep, best)
    plot_parallel(sweep.folder / PICTURE, rows, sweep.settings.space)
    blocks = page_blocks(sweep, rows, best, exploits)
    title = sweep.settings.title
    write_document(sweep.folder, "sweep", title, blocks)
    path = sweep.folder / "sweep.json"
    content = _as_json(sweep, rows, best, exploits)
    write_text(path, json_text(content, indent=2) + "\n")
    for line in text_table(rows):
        echo(line)
    echo(f"{sweep.folder}: {count_text(rows)}; the best is {best.run}, {accuracy_text(best)}")
    echo(f"judge it by: raymaml test {config_path}")
    return path


def export_best(sweep: Sweep, best: Report) -> Place:
    """Make ``best/``, a run folder with the best checkpoint alone, and return its config's path.

    An export of another checkpoint is moved aside, since it may have been judged.
    """
    folder, run = sweep.folder / BEST, sweep.folder / best.run
    source = checkpoint_path(run, best.step)
    before = _exported(folder)
    if before != best:
        if exists(folder):
            whose = "incomplete" if before is None else f"{before.run}-at-{before.step}"
            aside = folder.with_name(f"best-was-{whose}")
            while exists(aside):
                aside = aside.with_name(f"{aside.name}-again")
            rename_folder(folder, aside.name, _FROM)
        config = trained_config(source, sweep.base)
        evaluation = config.evaluation.model_copy(update={"checkpoint": "best"})
        own = {"name": BEST, "run_dir": sweep.folder, "evaluation": evaluation}
        with new_folder(folder, _FROM) as partial:
            copy_checkpoint(source, partial)
            for name in (METRICS_FILE, IDENTITY, LINEAGE_FILE):
                if exists(run / name):
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


def page_blocks(
    sweep: Sweep, rows: Sequence[TrialRow], best: Report, exploits: Sequence[Exploit]
) -> list[str]:
    """Return what the pages show."""
    settings = sweep.settings
    options = settings.scheduler.model_dump(exclude_none=True)
    blocks: list[str] = [
        paragraph(
            strong(
                f"{accuracy_text(best)} on the validation episodes by {best.run}"
                f" before outer step {best.step}"
            )
        ),
        paragraph(
            "The interval (95%) is over the validation episodes of that one trial. The best of many"
            " trials looks better than it is: judge it on the test episodes."
        ),
        paragraph(code(f"raymaml test {sweep.folder / BEST / 'config.yaml'}")),
        bullets(
            [
                ("scheduler", ", ".join(f"{key} {value}" for key, value in options.items())),
                ("trials", count_text(rows)),
                ("outer steps", _saved(rows, max_steps(sweep))),
                ("seed of the space", str(settings.seed)),
            ]
        ),
        heading("Trials"),
        table([_cells(row) for row in ranked(rows)], left=2),
        picture(PICTURE, "A line a trial, the better the darker; trials that ended early dashed"),
    ]
    if failed := [(row.run, row.problem) for row in rows if row.problem]:
        blocks += [heading("Failed"), bullets([(name, text or "") for name, text in failed])]
    if exploits:
        blocks += [heading("Lineage"), _lineage(exploits)]
    return blocks


def _saved(rows: Sequence[TrialRow], longest: int) -> str:
    taken, all_of_them = sum(row.steps for row in rows), longest * len(rows)
    return f"{taken:,} of {all_of_them:,} that all trials would have taken to their ends"


def _lineage(exploits: Sequence[Exploit]) -> str:
    return table(
        [
            {
                "trial": str(each.trial),
                "goes on from": each.donor_run,
                "before step": str(each.step),
                "had": f"{100 * each.accuracy:.2f}%",
                "donor has": f"{100 * each.donor_accuracy:.2f}%",
                **{key: str(value) for key, value in each.values.items()},
            }
            for each in exploits
        ],
        left=2,
    )


def _cells(row: TrialRow) -> dict[str, str]:
    return {
        "trial": str(row.trial),
        "status": row.status,
        "steps": f"{row.steps}/{row.num_steps}",
        "best validation accuracy": accuracy_text(row.best),
        **{key: str(value) for key, value in row.values.items()},
    }


def text_table(rows: Sequence[TrialRow]) -> list[str]:
    """Return the table as lines of text."""
    found = [_cells(row) for row in ranked(rows)]
    cells = [["trial", "status", "steps", "best", *rows[0].values]]
    cells += [[*each.values()] for each in found]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _as_json(
    sweep: Sweep, rows: Sequence[TrialRow], best: Report, exploits: Sequence[Exploit]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": sweep.settings.model_dump(mode="json"),
        "best": asdict(best),
        "trials": [asdict(row) for row in rows],
        "lineage": [asdict(each) for each in exploits],
    }
