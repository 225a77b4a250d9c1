"""The outer loop (Finn et al. 2017, algorithm 1): the whole run on one screen."""

from __future__ import annotations

from contextlib import closing

import torch

from raymaml.seeding import fold_in
from raymaml.training.explain import NotFiniteError, require_exact, require_finite
from raymaml.training.metrics import MetricsWriter
from raymaml.training.optimizer import update
from raymaml.training.reduction import flatten, mean_in_order, share, share_sizes, unflatten
from raymaml.training.run import Run
from raymaml.training.session import Session, gather_by_name
from raymaml.training.state import TrainState, initial_state
from raymaml.training.store import CheckpointStore
from raymaml.training.validation import validate
from raymaml.types import EpisodeBatch


def meta_train(
    run: Run, store: CheckpointStore, writer: MetricsWriter, session: Session
) -> TrainState:
    """Learn theta with all workers, from the last checkpoint on.

    The order is a contract. A checkpoint holds the state *before* outer step ``state.step``, and
    episodes depend on (seed, split, index) alone; so a run that is killed anywhere goes on to the
    same bits (contract 3).
    """
    outer, data = run.config.steps, run.data
    state = initial_state(run.learner, outer)
    store.restore(state, session)
    ways = run.config.episodes.train.num_ways
    require_exact(run.learner, run.config.model, data.image_shape, ways, session)
    writer.start(state.step)

    stop = False
    with closing(session.meta_batches(state.step)) as meta_batches:
        while not stop and state.step < outer.num_steps:
            if state.step % outer.validate_every == 0:
                judge_and_save(state, run, store, writer, session)
            elif outer.checkpoint_every is not None and state.step % outer.checkpoint_every == 0:
                store.save(state, session)

            try:
                means, stop = meta_step(state, next(meta_batches), run, session)
            except NotFiniteError:  # on all workers alike, and before the update
                store.save(state, session)
                raise
            state.step += 1
            if state.step % outer.log_every == 0:
                writer.training(state.step, means)

    if state.step == outer.num_steps:
        judge_and_save(state, run, store, writer, session)
    else:
        store.save(state, session)
    return state


def meta_step(
    state: TrainState, episodes: EpisodeBatch, run: Run, session: Session
) -> tuple[dict[str, float], bool]:
    """Take one outer step; also return whether any worker was asked to stop."""
    outer, learner, at_once = run.config.steps, state.learner, run.data.episodes_per_chunk
    moments = learner.running_moments
    stop = torch.tensor(float(session.stop_requested()), device=session.device)
    gradients, outcomes = [torch.empty(0, state.num_params, device=session.device)], []
    mine = share(outer.meta_batch_size, session.rank, session.world_size, at_once)
    for number, chunk in zip(mine[::at_once], episodes.chunks(at_once), strict=True):
        torch.manual_seed(fold_in(run.config.seed, "episode", state.step, number))  # for dropout
        for result, labels in zip(run.gradients(chunk, state.step), chunk.query_y, strict=True):
            gradient = flatten({name: result.grads[name] for name in state.params})
            # A gradient that is not finite makes the loss NaN: all workers see the losses.
            loss = torch.where(gradient.isfinite().all(), result.loss, torch.nan)
            accuracy = (result.logits.argmax(-1) == labels).float().mean()
            gradients.append(gradient[None])
            more = {**result.buffers, **result.metrics}
            outcomes.append({"loss": loss, "accuracy": accuracy, "stop": stop, **more})

    sizes = share_sizes(outer.meta_batch_size, session.world_size, at_once)
    metrics = dict.fromkeys(learner.metrics, stop)
    like = {"loss": stop, "accuracy": stop, "stop": stop, **moments, **metrics}
    of_all = gather_by_name(session, outcomes, like, sizes)  # each [E, ...], in episode order
    which = run.data.names(state.step)
    require_finite(of_all, "a loss or gradient", step=state.step, of=which, section=outer.section)
    mean = session.mean(torch.cat(gradients), sizes)  # [P], added up in episode order
    grad_norm = mean.norm().item()
    update(state.optimizer, outer, state.params, unflatten(mean, state.params), state.step)
    if moments:
        learner.absorb([{name: of_all[name][row] for name in moments} for row in range(sum(sizes))])
    mean_of = {n: mean_in_order(of_all[n]).item() for n in ("loss", "accuracy", "stop", *metrics)}
    means = {"query_loss": mean_of["loss"], "query_accuracy": mean_of["accuracy"]}
    means |= {name: mean_of[name] for name in metrics}
    return {**means, "grad_norm": grad_norm}, mean_of["stop"] > 0


def judge_and_save(
    state: TrainState,
    run: Run,
    store: CheckpointStore,
    writer: MetricsWriter,
    session: Session,
) -> None:
    """Judge the state on the validation episodes, unless that is done already, and save a
    checkpoint."""
    if state.validation is None or state.validation.step != state.step:
        validation = validate(state, run, session)
        state.record(validation, run.config.steps.keep_best)
        writer.validation(validation)
    store.save(state, session)
