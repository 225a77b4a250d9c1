"""A training run, resolved once, and its folder: one owner, one writer, one config."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raymaml.common.errors import StorageError, UserError
from raymaml.common.untrusted import json_text
from raymaml.config.load import dump_config
from raymaml.config.model import OuterSteps
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.learner import MetaLearner
from raymaml.meta.objective import query_weights
from raymaml.storage.files import exists, make_folder, reaching, remove, write_text
from raymaml.storage.lease import hold
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import remove_partial
from raymaml.training.at_once import AtOnce, judging_at_once
from raymaml.training.checkpoint import CARD, checkpoint_path, list_steps, read_card, saved_step
from raymaml.training.data import TrainingData, open_training_data
from raymaml.training.explain import explained
from raymaml.training.features import HEADS, at_once, features, nearest_class_mean, over_episodes
from raymaml.training.graphs import replayed
from raymaml.training.identity import IDENTITY, SCHEMA_VERSION, Classes, Identity, identity_of
from raymaml.training.images import LabelledImages
from raymaml.training.origin import require_of_today, require_same_start
from raymaml.training.plain import plain_gradients
from raymaml.training.settings import at_once_line, gradient_method, kernels_line, workers_line
from raymaml.training.state import build_classifier, build_learner
from raymaml.training.store import check_last
from raymaml.training.weights import Start, start_from_weights, weights_hash
from raymaml.types import EpisodeBatch

Gradients = Callable[[EpisodeBatch, int], list[EpisodeGradient]]
"""(episodes, outer step) -> the gradient of each."""
STOP = "STOP"
_LOOK_EVERY = 2.0
"""Seconds between two looks for a stop at a URI: a step should not wait for the network."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a process needs to train. Training changes ``learner``: open a run to train once.

    ``config`` is for code that writes it down or compares it; the loop takes the parts.
    """

    config: Config
    folder: Place
    data: TrainingData
    learner: MetaLearner
    identity: Identity
    gradients: Gradients
    """The gradients of training episodes, or of slices of labelled images."""
    predict: Callable[[EpisodeBatch], Tensor]
    """The query logits ``[E, N*Q, N]`` of validation episodes, computed at once."""
    at_once: AtOnce
    """The number of training episodes at once."""
    judged_at_once: AtOnce
    """The number of validation episodes at once."""
    start: str = ""
    """A sentence on the ``model.weights`` that the learner has; empty where it has none of them."""

    def introduction(self, device: torch.device, num_workers: int) -> str:
        """Return lines that say how workers on ``device`` train, and how each module adapts."""
        workers = workers_line([self.config.cluster], device, num_workers)
        start = f"{self.folder}: {self.start}\n" if self.start else ""
        if isinstance(images := self.data.train, LabelledImages):
            return (
                f"{start}{self.folder}: {workers}; cross-entropy over {images.num_classes} classes,"
                f" {self.data.meta_batch_size} slices of {images.slice_size} images a step"
            )
        config, spec = self.config, self.config.episodes.train
        support = (spec.num_ways * spec.num_shots, *self.data.image_shape)
        method = gradient_method(config.inner, config.model, config.cluster, support, device)
        chosen = " (auto)" if config.inner.gradient == "auto" else ""
        workers += at_once_line(config.cluster, device)
        workers += kernels_line([config.model], config.cluster, device)
        return (
            f"{start}{self.folder}: {workers}; meta-gradient by {method}{chosen}\n"
            f"{self.folder}: the inner loop adapts\n{self.learner.adaptation_table()}"
        )


def open_run(config: Config, device: torch.device) -> Run:
    """Open the data of a run and build its learner on ``device``.

    A run without a checkpoint starts from ``model.weights``, if the config names any.

    Raises:
        UserError: data are missing, damaged, made for another config or too small; the model cannot
            be built, or name patterns do not fit it; ``model.weights`` cannot be read or do not
            fit; or an earlier raymaml, or other weights, started the run.
    """
    require_of_today(config.run_folder)
    data, cluster = open_training_data(config, device), config.cluster
    train, shape = data.train, data.image_shape
    bank = train.loader.bank
    with explained(config.run_folder, cluster):
        if isinstance(train, LabelledImages):
            learner = build_classifier(config, shape, train.num_classes, device)
            gradients: Gradients = partial(plain_gradients, learner)
            predict = over_episodes(nearest_class_mean(features(learner)))
        else:
            learner = build_learner(config, shape, config.episodes.train.num_ways, device)
            gradients, predict = _by_graphs(config, learner)
    if saved_step(config.run_folder) < 0:
        start = start_from_weights(config, learner.model, shape)
    else:
        start = Start(weights_hash(config, shape))
    identity = identity_of(
        config, shape, bank.hash, train.manifest_hash, bank, weights_hash=start.hash
    )
    return Run(
        config=config,
        folder=config.run_folder,
        data=data,
        learner=learner,
        identity=identity,
        gradients=gradients,
        predict=predict,
        at_once=AtOnce(1 if config.stage == "pretrain" else cluster.episodes_per_chunk, device),
        judged_at_once=judging_at_once(cluster, config.test_inner, device),
        start=start.text,
    )


def _by_graphs(
    config: Config, learner: MetaLearner
) -> tuple[Gradients, Callable[[EpisodeBatch], Tensor]]:
    """Return the gradients and the predictions of a learner, on a GPU by CUDA graphs."""
    inner, head = config.inner, config.evaluation.head

    def key(outer_step: int) -> tuple[str, tuple[float, ...]]:
        return inner.gradient_at(outer_step), query_weights(inner, outer_step)

    of, test_inner = partial(replayed, cluster=config.cluster), config.test_inner
    gradients = of(learner.chunk_gradients, learner, inner, key=key, name="training")
    if head != "model":
        return gradients, over_episodes(HEADS[head](learner))
    return gradients, of(at_once(learner), learner, test_inner, name="validation")


@contextlib.contextmanager
def claim(run: Run) -> Iterator[None]:
    """Hold the run folder for the length of the block, making it if need be; nothing in it changes.

    Raises:
        UserError: another process holds it, it belongs to another config, its last checkpoint is
            damaged, or it cannot be made.
    """
    folder = run.folder
    make_folder(folder, "run_dir")
    taken = UserError(
        f"{folder}: another process is writing this run",
        remedy="wait for it, stop it, or choose another name",
    )
    with hold(folder / ".lock", taken=taken):
        require_same_start(folder, run.identity)
        check_last(folder, run.identity)
        withdraw_stop(folder)
        yield


@contextlib.contextmanager
def sole_writer(folder: Place) -> Iterator[Callable[[], None]]:
    """Hold the right to write checkpoints and metrics; rank 0 takes it, and gets a check for it.

    The worker of a driver that was just killed may live a few seconds longer: wait for its end.
    The right ends with the process, however that dies.
    """
    taken = UserError(
        f"{folder}: a worker of an earlier run still writes here after 60 s", remedy="end it first"
    )
    with hold(folder / ".writer", taken=taken, timeout=60) as require_held:
        remove_partial(folder)
        yield require_held


def request_stop(folder: Place) -> None:
    """Ask the run to stop at the next step boundary."""
    with reaching(folder):
        (folder / STOP).touch()


def withdraw_stop(folder: Place) -> None:
    """Forget that a stop was asked for."""
    remove(folder / STOP)


def stop_requested(folder: Place) -> bool:
    """Return whether a stop was asked for."""
    return exists(folder / STOP)


def watch_stop(folder: Place) -> Callable[[], bool]:
    """Return a function for every outer step: whether a stop was asked for."""
    next_look = 0.0

    def asked() -> bool:
        nonlocal next_look
        if time.monotonic() < next_look:
            return False
        if is_remote(folder):
            next_look = time.monotonic() + _LOOK_EVERY
        with contextlib.suppress(StorageError):  # where it is away for a moment: look again
            return stop_requested(folder)
        return False

    return asked


def write_identity(run: Run) -> None:
    """Write the config and, in a new run, its identity. The sole writer does it."""
    folder = run.folder
    if not exists(folder / IDENTITY):
        for path in (checkpoint_path(folder, step) for step in list_steps(folder)):
            card = read_card(path)
            if card.bank_hash == "":  # converted weights, from which the run goes on
                card = card.model_copy(update={"bank_hash": run.identity.bank_hash})
                write_text(path / CARD, card.as_text())
        identity = {
            "schema_version": SCHEMA_VERSION,
            **run.identity.of_run(),
            "classes": _classes(run.data.train.loader.bank),
        }
        write_text(folder / IDENTITY, json_text(identity, indent=2) + "\n")
    write_text(folder / "config.yaml", dump_config(run.config))


def is_done(folder: Place, outer: OuterSteps) -> bool:
    """Return whether the run in ``folder`` has no outer step left to do."""
    return saved_step(folder) >= outer.num_steps


def _classes(bank: ImageBank) -> Classes:
    return {
        split: {bank.classes[i].name: bank.class_digest(i) for i in bank.class_ids(split).tolist()}
        for split in ("train", "val")
    }
