"""One worker's run, in this process: the same for a lone process and for each Ray worker."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raymaml.common.logs import LOG
from raymaml.common.stopping import on_interrupt
from raymaml.config.schema import Config
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CheckpointStore, find_checkpoint, read_card
from raymaml.training.data import TrainingData, open_training_data, verify_images
from raymaml.training.faults import told
from raymaml.training.loop import meta_train
from raymaml.training.metrics import NoMetrics, RunMetrics, Show
from raymaml.training.process import prepare_process
from raymaml.training.run_folder import begin, claim, is_done, require_of_today, sole_writer
from raymaml.training.run_log import run_log
from raymaml.training.session import LocalSession, Session, local_device
from raymaml.training.settings import gradient_method, settings_line
from raymaml.training.state import TrainState, build_learner

Echo = Callable[[str], None]


def train_locally(config: Config, echo: Echo) -> bool:
    """Train in this process, without Ray; Ctrl-C and SIGTERM stop at the next step boundary.

    Returns:
        Whether all outer steps are done.
    """
    require_of_today(config)
    device = local_device(config.cluster)
    data = open_training_data(config, device)
    table = adaptation_table(config, data)
    with claim(config, data) as folder:
        if not is_done(folder, config):
            verify_images(data)
            echo(settings_line(config, data.image_shape, device, 1))
            echo(table)
            session = LocalSession(data, device)
            with on_interrupt(session.stop.set, config.cluster.grace_seconds):
                train_worker(config, folder, data, session, echo)
        return conclude(config, folder, echo)


def adaptation_table(config: Config, data: TrainingData) -> str:
    """Return what adapts in the inner loop, a line a module, and how many parameters it has.

    Raises:
        UserError: the model cannot be built, or the name patterns do not fit it.
    """
    ways = config.episodes.train.num_ways
    cpu = torch.device("cpu")
    with told(config, gradient_method(config, data.image_shape, cpu)):
        learner = build_learner(config, data.image_shape, ways, cpu)
    return f"{config.run_folder}: the inner loop adapts\n{learner.adaptation_table()}"


def train_worker(
    config: Config,
    folder: Place,
    data: TrainingData,
    session: Session,
    echo: Echo,
    *,
    show: Show = lambda _row: None,
) -> TrainState:
    """Run the loop with what this rank may write; rank 0 hands metrics to ``echo`` and ``show``.

    Raises:
        UserError: memory or storage do not suffice, data were altered, or numbers are not finite.
    """
    prepare_process(config.cluster, session.device)
    store = CheckpointStore(
        folder,
        config,
        image_shape=data.image_shape,
        bank_hash=data.train.shards.bank_hash,
    )
    store.require(data.require_unaltered)
    method = gradient_method(config, data.image_shape, session.device)
    with run_log(folder, config.name, session), told(config, method, data.require_unaltered):
        if session.rank != 0:
            state = meta_train(config, data, store, NoMetrics(), session)
        else:
            with sole_writer(folder) as require_held:
                store.require(require_held)
                begin(folder, config, data)
                metrics = RunMetrics(folder, config.outer, echo, show, workers=session.world_size)
                state = meta_train(config, data, store, metrics, session)
        LOG.info("done" if state.step == config.outer.num_steps else "stopped: it was asked to")
        return state


def conclude(config: Config, folder: Place, echo: Echo) -> bool:
    """Say where the run stands, and how to go on; tell whether all outer steps are done."""
    card = read_card(find_checkpoint(folder, "last"))
    if card.step < config.outer.num_steps:
        echo(
            f"{folder}: stopped before outer step {card.step} of {config.outer.num_steps}, and"
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
