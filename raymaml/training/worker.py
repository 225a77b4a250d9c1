"""One worker's run and its log: the same for a lone process and for each Ray worker."""

from __future__ import annotations

import contextlib
import logging
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

import torch

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.common.stopping import on_interrupt
from raymaml.config.schema import Config
from raymaml.storage.files import append_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import verify_images
from raymaml.training.explain import explained
from raymaml.training.loop import meta_train
from raymaml.training.metrics import NoMetrics, RunMetrics, Show
from raymaml.training.run import Run, claim, is_done, open_run, sole_writer, write_identity
from raymaml.training.session import LocalSession, Session
from raymaml.training.settings import kernels_in_use, local_device, prepare_process
from raymaml.training.state import TrainState
from raymaml.training.store import CheckpointStore

Echo = Callable[[str], None]


def train_locally(config: Config, echo: Echo) -> bool:
    """Train in this process, without Ray; Ctrl-C and SIGTERM stop at the next step boundary.

    Returns:
        Whether all outer steps are done.
    """
    device = local_device(config.cluster)
    run = open_run(config, device)
    with claim(run):
        if not is_done(run.folder, config.steps):
            verify_images(run.data)
            echo(run.introduction(device, 1))
            session = LocalSession(run.data, device)
            with on_interrupt(session.stop.set, config.cluster.grace_seconds):
                train_worker(run, session, echo)
        return conclude(run.folder, config.steps.num_steps, echo)


def train_worker(
    run: Run, session: Session, echo: Echo, *, show: Show = lambda _row: None
) -> TrainState:
    """Run the loop with what this rank may write; rank 0 hands metrics to ``echo`` and ``show``.

    Raises:
        UserError: memory or storage do not suffice, data were altered, or numbers are not finite.
    """
    folder, outer, cluster = run.folder, run.config.steps, run.config.cluster
    prepare_process(cluster, session.device)
    unaltered = run.data.require_unaltered
    method = "plain" if run.config.stage == "pretrain" else run.learner.inner.gradient
    with run_log(folder, run.config.name, session), explained(folder, cluster, method, unaltered):
        require_kernels_alike(run.config, session)
        if session.rank != 0:
            store = CheckpointStore(folder, run.identity, unaltered)
            state = meta_train(run, store, NoMetrics(), session)
        else:
            with sole_writer(folder) as require_held:
                run.at_once.announce = lambda line: echo(f"{folder}: {line}")
                write_identity(run)
                store = CheckpointStore(folder, run.identity, unaltered, require_held)
                metrics = RunMetrics(folder, outer, echo, show, workers=session.world_size)
                state = meta_train(run, store, metrics, session)
        LOG.info("done" if state.step == outer.num_steps else "stopped: it was asked to")
        return state


def require_kernels_alike(config: Config, session: Session) -> None:
    """Check that all workers have the kernels or none: their results differ by rounding.

    Raises:
        UserError: some have them and others have not.
    """
    has = kernels_in_use(config.model, config.cluster, session.device)
    row = torch.tensor([[float(has)]], device=session.device)
    having = int(session.gather(row, [1] * session.world_size).sum())
    if 0 < having < session.world_size:
        raise UserError(
            f"cluster.kernels: {having} of {session.world_size} workers can build the kernels, and"
            " results would depend on the worker that takes an episode",
            remedy="install g++ or clang++ on all nodes (raymaml doctor), or set it to off",
        )


def conclude(folder: Place, num_steps: int, echo: Echo) -> bool:
    """Print where the run stands, and how to resume; return whether all outer steps are done."""
    card = read_card(find_checkpoint(folder, "last"))
    if card.step < num_steps:
        echo(
            f"{folder}: stopped before outer step {card.step} of {num_steps}, and"
            " saved; run the same command to go on"
        )
        return False
    if card.best is not None:
        best = card.best
        echo(
            f"{folder}: done; best validation accuracy {100 * best.accuracy:.2f} +-"
            f" {100 * best.ci95:.2f}% before outer step {best.step}"
        )
    return True


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
    handler = RunLog(folder / "logs" / f"rank-{session.rank}.log", run, session.rank)
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
