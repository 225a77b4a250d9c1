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

    @property
    def adaptation_table(self) -> str:
        """A line a module: whether it adapts in the inner loop, and its number of parameters."""
        return f"{self.folder}: the inner loop adapts\n{self.learner.adaptation_table()}"

    def settings_line(self, device: torch.device, num_workers: int) -> str:
        """Return a line that says how workers on ``device`` train."""
        return settings_line(self.config, self.data.image_shape, device, num_workers)


def open_run(config: Config, device: torch.device) -> Run:
    """Open the data of a run and build its learner on ``device``.

    Raises:
        UserError: data are missing, damaged, made for another config or too small; the model cannot
            be built, or name patterns do not fit it; or an earlier raymaml started the run.
    """
    require_of_today(config.run_folder, config.outer.num_steps)
    data = open_training_data(config, device)
    method = gradient_method(config, data.image_shape, device)
    shards = data.train.shards
    identity = identity_of(config, data.image_shape, shards.bank_hash, shards.manifest_hash)
    with explained(config.run_folder, config.cluster, method):
        learner = build_learner(config, data.image_shape, config.episodes.train.num_ways, device)
    return Run(
        config=config, folder=config.run_folder, data=data, learner=learner, identity=identity
    )
