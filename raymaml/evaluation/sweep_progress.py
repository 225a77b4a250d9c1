"""How far a sweep is: a live table on a terminal, elsewhere a line a validation."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from raymaml.common.logs import plain
from raymaml.evaluation.campaign import Echo
from raymaml.evaluation.population import Exploit
from raymaml.evaluation.progress import LiveTable
from raymaml.evaluation.referee import Referee
from raymaml.evaluation.sweep import Sweep
from raymaml.evaluation.sweep_table import TrialRow, accuracy_text, count_text, ranked, trial_rows


class SweepProgress(LiveTable):
    """Shows every news of the referee's.

    Args:
        sweep: its trials.
        referee: what is known of them.
        exploits: who went on from whose weights; the list may grow.
        echo: receives the lines, where there is no terminal.
    """

    def __init__(
        self, sweep: Sweep, referee: Referee, exploits: Sequence[Exploit], echo: Echo
    ) -> None:
        super().__init__()
        self._sweep = sweep
        self._exploits = exploits
        self._referee = referee
        self._echo = echo

    def show(self, trial: int) -> None:
        """Show what is new of a trial."""
        if self.redraw():
            return
        rows = trial_rows(self._sweep, self._referee, self._exploits)
        self._echo(f"{self._news(rows[trial])}  ({count_text(rows)})")

    def _news(self, row: TrialRow) -> str:
        if row.problem is not None:
            return f"trial {row.trial}  failed: {row.problem}"
        last = self._referee.of(row.trial)[-1]
        step = f"step {last.step:>{len(str(row.num_steps))}}/{row.num_steps}"
        word = "goes on" if row.status == "running" else row.status
        return f"trial {row.trial}  {step}  validation accuracy {accuracy_text(last)}  {word}"

    def table(self) -> Table:
        """Return the trials, the best first."""
        rows = trial_rows(self._sweep, self._referee, self._exploits)
        table = Table("trial", "status", "steps", "best", *self._sweep.settings.space)
        table.title = count_text(rows)
        for row in ranked(rows):
            values = [plain(str(value)) for value in row.values.values()]
            steps = f"{row.steps}/{row.num_steps}"
            table.add_row(str(row.trial), row.status, steps, accuracy_text(row.best), *values)
        return table
