"""A training run, resolved once: the parts that its config stands for, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raymaml.config.schema import Config
from raymaml.meta.learner import MetaLearner
from raymaml.storage.place import Place
from raymaml.training.data import TrainingData, open_training_data
from raymaml.training.explain import explained
from raymaml.training.identity import Identity, identity_of
from raymaml.training.settings import gradient_method, settings_line
from raymaml.training.state import build_learner
from raymaml.training.trust import require_of_today


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

    def introduction(self, device: torch.device, num_workers: int) -> str:
        """Return lines that say how workers on ``device`` train, and how each module adapts."""
        settings = settings_line(self.config, self.data.image_shape, device, num_workers)
        table = self.learner.adaptation_table()
        return f"{settings}\n{self.folder}: the inner loop adapts\n{table}"


def open_run(config: Config, device: torch.device) -> Run:
    """Open the data of a run and build its learner on ``device``.

    Raises:
        UserError: data are missing, damaged, made for another config or too small; the model cannot
            be built, or name patterns do not fit it; or an earlier raymaml started the run.
    """
    require_of_today(config.run_folder)
    data = open_training_data(config, device)
    method = gradient_method(config, data.image_shape, device)
    shards = data.train.shards
    identity = identity_of(config, data.image_shape, shards.bank_hash, shards.manifest_hash)
    with explained(config.run_folder, config.cluster, method):
        learner = build_learner(config, data.image_shape, config.episodes.train.num_ways, device)
    return Run(
        config=config, folder=config.run_folder, data=data, learner=learner, identity=identity
    )
