"""The outer loop (Finn et al. 2017, algorithm 1): the whole run on one screen."""

from __future__ import annotations

from contextlib import closing

import torch

from raymaml.meta.gradients import EpisodeGradient
from raymaml.seeding import fold_in
from raymaml.training.explain import NotFiniteError, finite_rows, require_exact, require_finite
from raymaml.training.metrics import MetricsWriter
from raymaml.training.optimizer import update
from raymaml.training.reduction import flatten, mean_in_order, read, share, share_sizes, unflatten
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
    outer, learner, together = run.config.steps, state.learner, run.data.episodes_together
    moments = learner.running_moments
    stop = torch.full((), float(session.stop_requested()), device=session.device)
    gradients, outcomes = [torch.empty(0, state.num_params, device=session.device)], []
    mine = share(outer.meta_batch_size, session.rank, session.world_size, together)

    def gradients_of(rows: range) -> list[EpisodeGradient]:
        number = mine[rows.start]
        torch.manual_seed(fold_in(run.config.seed, "episode", state.step, number))  # for dropout
        return run.gradients(episodes.among(rows), state.step)

    found = run.at_once.apply(len(mine), gradients_of)
    for result, labels in zip(found, episodes.query_y, strict=True):
        gradient = flatten({name: result.grads[name] for name in state.params})
        # A gradient that is not finite makes the loss NaN: all workers see the losses.
        loss = torch.where(gradient.isfinite().all(), result.loss, torch.nan)
        accuracy = (result.logits.argmax(-1) == labels).float().mean()
        gradients.append(gradient[None])
        more = {**result.buffers, **result.metrics}
        outcomes.append({"loss": loss, "accuracy": accuracy, "stop": stop, **more})

    sizes = share_sizes(outer.meta_batch_size, session.world_size, together)
    metrics = dict.fromkeys(learner.metrics, stop)
    like = {"loss": stop, "accuracy": stop, "stop": stop, **moments, **metrics}
    of_all = gather_by_name(session, outcomes, like, sizes)  # each [E, ...], in episode order
    mean = session.mean(torch.cat(gradients), sizes)  # [P], added up in episode order
    finite, numbers = finite_rows(of_all), ("loss", "accuracy", "stop", *metrics)
    averages = {name: mean_in_order(of_all[name]) for name in numbers}
    means = read({**averages, "grad_norm": mean.norm(), "finite": finite.all()})
    if not means["finite"]:
        which, what = run.data.names(state.step), "a loss or gradient"
        require_finite(finite, what, step=state.step, of=which, section=outer.section)
    update(state.optimizer, outer, state.params, unflatten(mean, state.params), state.step)
    if moments:
        learner.absorb([{name: of_all[name][row] for name in moments} for row in range(sum(sizes))])
    shown = {"query_loss": means["loss"], "query_accuracy": means["accuracy"]}
    return shown | {name: means[name] for name in (*metrics, "grad_norm")}, means["stop"] > 0


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
