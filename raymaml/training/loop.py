"""The outer loop (Finn et al. 2017, algorithm 1): the whole run on one screen."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import torch

from raymaml.config.schema import Config
from raymaml.seeding import fold_in
from raymaml.training.checkpoint import CheckpointStore
from raymaml.training.data import TrainingData, training_episodes
from raymaml.training.faults import require_exact
from raymaml.training.finite import NotFiniteError, require_finite
from raymaml.training.metrics import MetricsWriter
from raymaml.training.outer import update
from raymaml.training.reduction import flatten, mean_in_order, share, share_sizes, unflatten
from raymaml.training.session import Session
from raymaml.training.state import TrainState, build_state
from raymaml.training.validation import validate
from raymaml.types import EpisodeBatch


def meta_train(
    config: Config,
    data: TrainingData,
    store: CheckpointStore,
    writer: MetricsWriter,
    session: Session,
) -> TrainState:
    """Learn theta with all workers, from the last checkpoint on.

    The order is a contract. A checkpoint holds the state *before* outer step ``state.step``, and
    episodes depend on (seed, split, index) alone; so a run that is killed anywhere goes on to the
    same bits (contract 3).
    """
    outer = config.outer
    state = build_state(config, data.image_shape, session.device)
    store.restore(state, session)
    require_exact(state.learner, config, data.image_shape, session)
    writer.start(state.step)

    stop = False
    with closing(session.meta_batches(state.step)) as meta_batches:
        while not stop and state.step < outer.num_steps:
            if state.step % outer.validate_every == 0:
                judge_and_save(state, data, store, writer, session)
            elif outer.checkpoint_every is not None and state.step % outer.checkpoint_every == 0:
                store.save(state, session)

            try:
                metrics, stop = meta_step(state, next(meta_batches), config, session)
            except NotFiniteError:  # on all workers alike, and before the update
                store.save(state, session)
                raise
            state.step += 1
            if state.step % outer.log_every == 0:
                writer.training(state.step, metrics)

    if state.step == outer.num_steps:
        judge_and_save(state, data, store, writer, session)
    else:
        store.save(state, session)
    return state


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Means over the episodes of one outer step."""

    loss: float
    accuracy: float
    grad_norm: float


def meta_step(
    state: TrainState, episodes: EpisodeBatch, config: Config, session: Session
) -> tuple[StepMetrics, bool]:
    """Take one outer step; also tell whether any worker was asked to stop."""
    outer, learner = config.outer, state.learner
    stop = float(session.stop_requested())
    moments = learner.running_moments
    widths = state.num_params, sum(each.numel() for each in moments.values()) + 3
    gradients, outcomes = ([torch.empty(0, n, device=session.device)] for n in widths)
    at_once = config.cluster.episodes_per_chunk
    mine = share(outer.meta_batch_size, session.rank, session.world_size, at_once)
    for number, chunk in zip(mine[::at_once], episodes.chunks(at_once), strict=True):
        torch.manual_seed(fold_in(config.seed, "episode", state.step, number))  # for dropout
        for result, labels in zip(learner.chunk_gradients(chunk), chunk.query_y, strict=True):
            gradient = flatten({name: result.grads[name] for name in state.params})
            # What is not finite anywhere is so in the loss, which all workers see.
            loss = torch.where(gradient.isfinite().all(), result.loss, torch.nan)
            accuracy = (result.logits.argmax(-1) == labels).float().mean()
            kept = {name: result.buffers[name] for name in moments}
            outcome = {**kept, "loss": loss, "accuracy": accuracy, "stop": loss.new_tensor(stop)}
            gradients.append(gradient[None])
            outcomes.append(flatten(outcome)[None])

    sizes = share_sizes(outer.meta_batch_size, session.world_size, at_once)
    gathered = session.gather(torch.cat(outcomes), sizes)  # [E, moments + 3], in episode order
    of = training_episodes(config, state.step)
    require_finite(gathered, "a loss or gradient", step=state.step, kind="training", of=of)
    mean = session.mean(torch.cat(gradients), sizes)  # [P], added up in episode order
    grad_norm = mean.norm().item()
    update(state.optimizer, outer, state.params, unflatten(mean, state.params), state.step)
    if moments:
        learner.absorb([unflatten(row[:-3], moments) for row in gathered])
    *_, mean_loss, mean_accuracy, stops = mean_in_order(gathered).tolist()
    return StepMetrics(loss=mean_loss, accuracy=mean_accuracy, grad_norm=grad_norm), stops > 0


def judge_and_save(
    state: TrainState,
    data: TrainingData,
    store: CheckpointStore,
    writer: MetricsWriter,
    session: Session,
) -> None:
    """Judge the state on the validation episodes, unless it has been, and keep it."""
    if state.validation is None or state.validation.step != state.step:
        validation = validate(state, data, session)
        state.record(validation)
        writer.validation(validation)
    store.save(state, session)
