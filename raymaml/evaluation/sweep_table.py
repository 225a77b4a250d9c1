"""How it stands with the trials of a sweep, a row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymaml.evaluation.population import Exploit
from raymaml.evaluation.referee import Referee, Report, Status
from raymaml.evaluation.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: what it differs by, how far it came, and the best it reached."""

    trial: int
    run: str
    """Name of the run folder in which it reached its best."""
    status: Status
    steps: int
    """Outer steps at its last validation."""
    num_steps: int
    best: Report | None
    values: dict[str, Any]
    """Of that run, by dotted key."""
    problem: str | None
    """Why it failed."""


def trial_rows(sweep: Sweep, referee: Referee, exploits: Sequence[Exploit] = ()) -> list[TrialRow]:
    """Return the rows in the order of the trials."""
    later_values = {exploit.run: exploit.values for exploit in exploits}
    rows = []
    for trial in sweep.trials:
        reports = referee.of(trial.number)
        best = max(reports, key=lambda report: report.accuracy, default=None)
        run = trial.config.name if best is None else best.run
        num_steps = trial.config.outer.num_steps
        rows.append(
            TrialRow(
                trial=trial.number,
                run=run,
                status=referee.status(trial.number, num_steps),
                steps=max((report.step for report in reports), default=0),
                num_steps=num_steps,
                best=best,
                values=later_values.get(run, trial.values),
                problem=referee.failures.get(trial.number),
            )
        )
    return rows


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the rows by accuracy, the best first; those without one stand last."""
    return sorted(rows, key=lambda row: (-row.best.accuracy if row.best else 1.0, row.trial))


def accuracy_text(report: Report | None) -> str:
    """Return an accuracy with its interval, as everywhere."""
    if report is None:
        return "-"
    margin = f" +- {100 * report.ci95:.2f}" if np.isfinite(report.ci95) else ""
    return f"{100 * report.accuracy:.2f}{margin}%"


def count_text(rows: Sequence[TrialRow]) -> str:
    """Return how many trials are where, as in ``2 running, 3 done``."""
    counts = Counter(row.status for row in rows)
    kinds: tuple[Status, ...] = ("running", "waiting", "done", "stopped", "failed")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])
