"""The checkpoints of a run: it keeps the last and the best ones, and goes on from the last."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.storage.files import remove_folder, write_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import (
    CARD,
    checkpoint_path,
    damaged,
    judged,
    list_steps,
    load_tensors,
    read_card,
    saved_step,
    write_checkpoint,
)
from raymaml.training.identity import Identity
from raymaml.training.origin import require_of_run
from raymaml.training.session import Session
from raymaml.training.state import TrainState, load_params, require_fitting
from raymaml.training.tensor_file import load_optimizer


class CheckpointStore:
    """The checkpoints of one run folder, written by rank 0 and read by all workers.

    Each of ``checks`` is called before each save; it raises where nothing may be saved.
    """

    def __init__(self, folder: Place, identity: Identity, *checks: Callable[[], None]) -> None:
        self.folder = folder
        self._identity = identity
        self._checks = checks

    def restore(self, state: TrainState, session: Session) -> None:
        """Load the newest checkpoint into ``state``; leave it as it is where there is none.

        All workers load what rank 0 finds.

        Raises:
            UserError: the checkpoint is damaged, or of another run.
        """
        step = session.from_rank_zero(saved_step(self.folder))
        if step < 0:
            LOG.info("begins with the initial weights", extra={"state": state})
            return
        path = checkpoint_path(self.folder, step)
        require_of_run(path, self._identity)
        card = read_card(path)
        params = load_tensors(path, card, card.weights, session.device)
        require_fitting(path, params, state.weights)
        # its numbers of steps stay on the CPU, or each step would read them from a GPU
        optimizer = load_tensors(path, card, "optimizer.pt", torch.device("cpu"))
        try:
            load_optimizer(state.optimizer, optimizer)
        except ValueError as error:
            raise damaged(path, "optimizer.pt", str(error)) from None
        load_params(state.learner, params)
        state.step, state.validation, state.leaders = card.step, card.validation, card.leaders
        LOG.info("goes on from %s", path.name, extra={"state": state})

    def save(self, state: TrainState, session: Session) -> None:
        """Write a checkpoint, drop the ones no longer needed, and report it.

        Raises:
            UserError: the data were altered, another process writes here, or the storage refuses.
            RuntimeError: the workers' weights differ (a defect, or broken hardware).
        """
        for check in self._checks:
            check()
        _require_equal_replicas(state, session)
        path = checkpoint_path(self.folder, state.step)
        if session.rank == 0:
            self._write(path, state)
            keep = {state.step, *(each.step for each in state.leaders)}
            for step in set(list_steps(self.folder)) - keep:
                remove_folder(checkpoint_path(self.folder, step), CARD)
        found = state.validation
        session.report(state.step, found if found and found.step == state.step else None, path)
        LOG.info("checkpoint %s", path.name, extra={"state": state})

    def _write(self, path: Place, state: TrainState) -> None:
        if state.step in list_steps(self.folder):
            # Written before by a run that was then stopped; only its validation can differ.
            card = read_card(path)
            if card.validation != state.validation:
                write_text(path / CARD, card.model_copy(update=judged(state)).as_text())
            return
        write_checkpoint(path, state, self._identity)


def check_last(folder: Place, identity: Identity) -> None:
    """Check that the checkpoint that a run would go on from, if any, is whole, and is of the run.

    Raises:
        UserError: it is damaged, or it or the best one is of another run.
    """
    while steps := list_steps(folder):
        path = checkpoint_path(folder, steps[-1])
        try:
            card = read_card(path)
            for name in card.files:
                load_tensors(path, card, name, torch.device("cpu"))
            require_of_run(path, identity)
            return
        except UserError:
            if list_steps(folder) == steps:
                raise
            # A worker that outlives its killed driver has just dropped one for a newer one.


def _require_equal_replicas(state: TrainState, session: Session) -> None:
    digest = torch.tensor([[state.digest()]], device=session.device)
    digests = session.gather(digest, [1] * session.world_size)
    if (digests != digest).any():
        raise RuntimeError(
            f"outer step {state.step}: the workers' weights differ ({digests[:, 0].tolist()});"
            " nothing was saved"
        )
