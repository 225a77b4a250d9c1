"""The log of each worker: ``<run folder>/logs/rank-<r>.log``."""

from __future__ import annotations

import contextlib
import logging
import socket
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.storage.files import append_text
from raymaml.storage.place import Place
from raymaml.training.session import Session

LOGS = "logs"


class RunLog(logging.Handler):
    """Appends each record of ``LOG`` as lines ``<run> rank <r> step <s>: message``.

    The step is that of the state that a record brings along as ``extra={"state": state}``; later
    records without one are about the same state. A file that cannot be written stops no run.
    """

    def __init__(self, path: Place, run: str, rank: int) -> None:
        super().__init__()
        self._path = path
        self._run = f"{run} rank {rank}"
        self._state: object = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append the lines of one record."""
        self._state = getattr(record, "state", self._state)
        head = f"{self._run} step {getattr(self._state, 'step', '-')}: "
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        with contextlib.suppress(Exception):  # of the disk, or of the network
            append_text(self._path, "".join(f"{head}{line}\n" for line in text.splitlines()))


@contextlib.contextmanager
def run_log(folder: Place, run: str, session: Session) -> Iterator[None]:
    """Log the records of the block, which is one worker's run, and the error that ends it."""
    handler = RunLog(folder / LOGS / f"rank-{session.rank}.log", run, session.rank)
    LOG.addHandler(handler)
    try:
        LOG.info(
            "starts at %s on %s, %s, one of %d worker(s)",
            datetime.now(timezone.utc).isoformat(" ", "seconds"),
            socket.gethostname(),
            session.device,
            session.world_size,
        )
        yield
    except UserError as error:
        LOG.error("stopped by an error: %s", error)
        raise
    except BaseException as error:
        LOG.error("stopped by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        LOG.removeHandler(handler)
        handler.close()
