"""Validation on fixed episodes, shared out over the workers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.common.logs import LOG
from raymaml.statistics.intervals import bounded_interval
from raymaml.training.at_once import computed
from raymaml.training.explain import finite_rows, require_finite
from raymaml.training.reduction import share, share_sizes
from raymaml.training.run import Run
from raymaml.training.session import Session, gather_by_name
from raymaml.training.state import TrainState, Validation
from raymaml.types import EpisodeBatch, Params


def validate(state: TrainState, run: Run, session: Session) -> Validation:
    """Judge the state on all validation episodes; equal on all workers, for any number of them.

    Raises:
        NotFiniteError: naming the first episode whose loss is not finite, on all workers alike.
    """
    data, count = run.data, run.data.val.shards.count
    mine = share(count, session.rank, session.world_size, data.episodes_together)

    def judged(episodes: EpisodeBatch) -> list[Params]:
        return list(map(_outcome, run.predict(episodes), episodes.query_y))

    outcomes = list(computed(data.val, mine, run.judged_at_once, judged))
    number = torch.zeros((), device=session.device)
    sizes = share_sizes(count, session.world_size, data.episodes_together)
    of_all = gather_by_name(session, outcomes, {"loss": number, "accuracy": number}, sizes)
    which, section = data.val.names(range(count)), run.config.steps.section
    require_finite(finite_rows(of_all), "a loss", step=state.step, of=which, section=section)
    interval = bounded_interval(of_all["accuracy"].double().cpu().numpy())
    found = Validation(
        step=state.step,
        accuracy=interval.mean,
        ci95=interval.half_width,
        loss=float(of_all["loss"].double().cpu().numpy().mean()),
    )
    LOG.info(
        "validation accuracy %.2f +- %.2f%%, loss %.4f, over %d episodes, %d of them judged here",
        *(100 * found.accuracy, 100 * found.ci95, found.loss, count, len(mine)),
        extra={"state": state},
    )
    return found


def _outcome(logits: Tensor, labels: Tensor) -> Params:
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}
