"""One worker's run, in this process: the same for a lone process and for each Ray worker."""

from __future__ import annotations

from collections.abc import Callable

from raymaml.common.logs import LOG
from raymaml.common.stopping import on_interrupt
from raymaml.config.schema import Config
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import verify_images
from raymaml.training.explain import explained
from raymaml.training.loop import meta_train
from raymaml.training.metrics import NoMetrics, RunMetrics, Show
from raymaml.training.process import prepare_process
from raymaml.training.run import Run, open_run
from raymaml.training.run_folder import claim, is_done, sole_writer, write_identity
from raymaml.training.run_log import run_log
from raymaml.training.session import LocalSession, Session, local_device
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
        if not is_done(config):
            verify_images(run.data)
            echo(run.settings_line(device, 1))
            echo(run.adaptation_table)
            session = LocalSession(run.data, device)
            with on_interrupt(session.stop.set, config.cluster.grace_seconds):
                train_worker(run, session, echo)
        return conclude(run.folder, config.outer.num_steps, echo)


def train_worker(
    run: Run, session: Session, echo: Echo, *, show: Show = lambda _row: None
) -> TrainState:
    """Run the loop with what this rank may write; rank 0 hands metrics to ``echo`` and ``show``.

    Raises:
        UserError: memory or storage do not suffice, data were altered, or numbers are not finite.
    """
    folder, outer, cluster = run.folder, run.config.outer, run.config.cluster
    prepare_process(cluster, session.device)
    store = CheckpointStore(folder, run.identity)
    store.require(run.data.require_unaltered)
    method = run.learner.inner.gradient
    with (
        run_log(folder, run.config.name, session),
        explained(folder, cluster, method, run.data.require_unaltered),
    ):
        if session.rank != 0:
            state = meta_train(run, store, NoMetrics(), session)
        else:
            with sole_writer(folder) as require_held:
                store.require(require_held)
                write_identity(run)
                metrics = RunMetrics(folder, outer, echo, show, workers=session.world_size)
                state = meta_train(run, store, metrics, session)
        LOG.info("done" if state.step == outer.num_steps else "stopped: it was asked to")
        return state


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
