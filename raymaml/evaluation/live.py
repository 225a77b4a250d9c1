"""A table that is drawn again and again on a terminal."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import TracebackType

from rich.live import Live
from rich.table import Table
from typing_extensions import Self


class LiveTable(ABC):
    """On a terminal, shows ``table()`` during a ``with`` block; elsewhere nothing."""

    def __init__(self) -> None:
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self.redraw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def redraw(self) -> bool:
        """Draw the table as it is now; False where there is no terminal."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
        return self._live is not None

    @abstractmethod
    def table(self) -> Table:
        """Return the table as it is now."""
