"""The progress of a campaign: a live table on a terminal, elsewhere one line per chunk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.live import Live
from rich.table import Table
from typing_extensions import Self

from raymaml.statistics.intervals import IntervalOf, bounded_interval
from raymaml.training.metrics import Show, duration


class Progress:
    """Running means with their intervals, over all records; rate and time left, over the records of
    this session.

    Args:
        todo: episodes in all, by arm.
        recorded: accuracies of those that are judged already, by arm.
        echo: receives the lines, where there is no terminal.
        show: called with the numbers of each arm at the beginning, and after each of its chunks.
        interval: of the accuracies.
    """

    def __init__(
        self,
        todo: Mapping[str, int],
        recorded: Mapping[str, Sequence[float]],
        echo: Callable[[str], None],
        show: Show = lambda _row: None,
        *,
        interval: IntervalOf = bounded_interval,
    ) -> None:
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self._todo = dict(todo)
        self._accuracies = {arm: list(recorded[arm]) for arm in todo}
        self._before = self._judged()
        self._echo = echo
        self._show = show
        self._interval = interval
        self._started = time.perf_counter()
        self._rate = 0.0  # episodes/s, when the last chunk was done

    def __enter__(self) -> Self:
        for arm in self._todo:
            self._show(self._row(arm))
        if self._live is not None:
            self._live.start()
            self._live.update(self.table(), refresh=True)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, arm: str, count: int, accuracies: Sequence[float]) -> None:
        """Note a finished chunk of ``count`` episodes.

        A chunk without accuracies was left out: its episodes need no judging.
        """
        self._accuracies[arm].extend(accuracies)
        self._todo[arm] -= count - len(accuracies)
        here = self._judged() - self._before
        self._rate = here / (time.perf_counter() - self._started)
        self._show(self._row(arm))
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            return
        todo = sum(self._todo.values())
        self._echo(
            f"{self._judged():>{len(str(todo))}}/{todo} episodes  {self._arms_done()}"
            f"  {arm} {self._mean(arm)} over {len(self._accuracies[arm])}  {self._speed()}"
        )

    def table(self) -> Table:
        """Return the arms with their means."""
        table = Table("arm", "episodes", "accuracy", title=self._arms_done(), caption=self._speed())
        for arm, todo in self._todo.items():
            table.add_row(arm, f"{len(self._accuracies[arm]):,}/{todo:,}", self._mean(arm))
        return table

    def _judged(self) -> int:
        return sum(map(len, self._accuracies.values()))

    def _arms_done(self) -> str:
        finished = sum(len(self._accuracies[arm]) >= todo for arm, todo in self._todo.items())
        return f"{finished}/{len(self._todo)} arms done"

    def _row(self, arm: str) -> dict[str, str | float]:
        judged = self._accuracies[arm]
        row: dict[str, str | float] = {"arm": arm, "episodes": len(judged)}
        row["episodes_per_second"] = self._rate
        if judged:
            found = self._interval(np.asarray(judged))
            row |= {"accuracy": found.mean, "ci95": found.half_width}
        return row

    def _mean(self, arm: str) -> str:
        if not self._accuracies[arm]:
            return "-"
        found = self._interval(np.asarray(self._accuracies[arm]))
        return f"{100 * found.mean:.2f} +- {100 * found.half_width:.2f}%"

    def _speed(self) -> str:
        left = sum(self._todo.values()) - self._judged()
        time_left = "?" if left and not self._rate else duration(left / (self._rate or 1))
        return f"{self._rate:.1f} episodes/s  {time_left} left"
