"""A campaign: arms judged on the test episodes in chunks, in any order and any process."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raymaml.config.model import InnerConfig
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.errors import UserError
from raymaml.evaluation.records import chunk_path, missing_chunks, read_records, write_chunk
from raymaml.evaluation.trial import judge
from raymaml.meta.learner import MetaLearner
from raymaml.seeding import fold_in
from raymaml.training.checkpoint import (
    find_checkpoint,
    load_tensors,
    read_card,
    require_same_model,
    versions,
)
from raymaml.training.data import EpisodeSet, open_bank, open_episode_sets
from raymaml.training.metrics import METRICS_FILE, duration, read_metrics
from raymaml.training.process import prepare_process
from raymaml.training.session import local_device
from raymaml.training.settings import image_layout
from raymaml.training.state import build_learner, load_params

Echo = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting of a campaign."""

    name: str
    description: str
    checkpoint: Path | None
    """Weights to judge; None: the initial ones."""
    inner: InnerConfig
    num_episodes: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A range of episodes of one arm: the work of one trial."""

    arm: str
    first: int
    count: int


@dataclass(frozen=True)
class Campaign:
    """All that judging needs, planned from the config and the run folder alone.

    Records lie under ``<run folder>/test/<arm>/<identity>/``: other weights, episodes or inner
    loops are another folder, so that nothing is overwritten and nothing is mixed.
    """

    config: Config
    arms: tuple[Arm, ...]
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where records and report are written."""
        return self.config.run_folder / "test"

    @cached_property
    def bank(self) -> ImageBank:
        """The images."""
        return open_bank(self.config)

    @cached_property
    def episodes(self) -> EpisodeSet:
        """The test episodes."""
        return open_episode_sets(self.config, self.bank, ("test",), self.device)["test"]

    def arm(self, name: str) -> Arm:
        """Return an arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    def missing(self) -> list[Chunk]:
        """Return the work that no complete record file shows as done."""
        return [
            Chunk(arm=arm.name, first=episodes.start, count=len(episodes))
            for arm in self.arms
            for episodes in missing_chunks(
                self._records(arm),
                arm.num_episodes,
                self.config.evaluation.chunk_size,
                self._identity(arm),
            )
        ]

    def judge(self, chunk: Chunk) -> list[float]:
        """Judge a chunk, write its records, and return its accuracies."""
        arm = self.arm(chunk.arm)
        indices = range(chunk.first, chunk.first + chunk.count)
        records = list(judge(self.learner(arm), self.episodes, indices))
        path = chunk_path(self._records(arm), chunk.first, chunk.count)
        write_chunk(path, records, self._identity(arm))
        return [record.accuracy for record in records]

    def report(self) -> Path:
        """Write the report and return the path of ``summary.json``.

        Raises:
            UserError: not all chunks are done.
        """
        # Here, since it imports matplotlib, which no process that only judges needs.
        from raymaml.evaluation.report import ArmResult, protocol_line, write_report

        missing = self.missing()
        if missing:
            episodes = sum(chunk.count for chunk in missing)
            raise UserError(
                f"{self.folder}: {episodes} episodes in {len(missing)} chunks are not judged yet;"
                " run `raymaml test` with the same CONFIG to judge them"
            )
        config = self.config
        results = [
            ArmResult(
                name=arm.name,
                description=arm.description,
                records=read_records(self._records(arm), arm.num_episodes, self._identity(arm)),
            )
            for arm in self.arms
        ]
        return write_report(
            self.folder,
            results,
            protocol=protocol_line(config.episodes.test, config.model, config.test_inner.num_steps),
            identity=self._full_identity(),
            curve=[
                row
                for row in read_metrics(config.run_folder / METRICS_FILE)
                if "val_accuracy" in row
            ],
            title=f"{config.name}: test report",
        )

    def _records(self, arm: Arm) -> Path:
        digest = fold_in(0, json.dumps(self._identity(arm), sort_keys=True))
        return self.folder / arm.name / f"{digest:016x}"

    def _identity(self, arm: Arm) -> dict[str, str]:
        """Return what decides a record of ``arm``."""
        config = self.config
        weights = (
            f"initial, seed {config.seed}"
            if arm.checkpoint is None
            else read_card(arm.checkpoint).files["params.pt"]
        )
        return {
            "weights": weights,
            "model": config.model.model_dump_json(),
            "inner": arm.inner.model_dump_json(),
            "precision": config.cluster.precision,
            "memory_format": image_layout(config, self.device),
            "normalize": json.dumps(config.data.model_dump(mode="json")["normalize"]),
            "augment": config.data.augment.test.model_dump_json(),
            "bank": self.episodes.shards.bank_hash,
            "episodes": self.episodes.shards.manifest_hash,
            "versions": json.dumps(versions(), sort_keys=True),
        }

    def _full_identity(self) -> dict[str, Any]:
        arm = self.arms[0]
        return {
            "run": self.config.name,
            "checkpoint": arm.checkpoint.name if arm.checkpoint else "none",
            **self._identity(arm),
            "source": self.bank.source,
            "licence": self.bank.licence,
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {self.device.type}",
        }

    def learner(self, arm: Arm) -> MetaLearner:
        """Build what ``arm`` judges.

        Raises:
            UserError: the model cannot be built, or name patterns do not fit it.
        """
        learner = build_learner(
            self.config,
            self.bank.image_shape,
            self.config.episodes.test.num_ways,
            self.device,
            arm.inner,
        )
        if arm.checkpoint is not None:
            card = read_card(arm.checkpoint)
            load_params(learner, load_tensors(arm.checkpoint, card, "params.pt", self.device))
        return learner


def plan_campaign(config: Config, device: torch.device) -> Campaign:
    """Plan the test of a run: the model, and the baselines that show what it learned.

    Raises:
        UserError: the run has no checkpoint, or test episodes are missing or do not fit.
    """
    checkpoint = find_checkpoint(config.run_folder, config.evaluation.checkpoint)
    inner, count = config.test_inner, config.episodes.test.num_episodes
    few = min(config.evaluation.baseline_episodes, count)
    model = Arm(
        name="model",
        description=f"{config.evaluation.checkpoint} checkpoint, adapted",
        checkpoint=checkpoint,
        inner=inner,
        num_episodes=count,
    )
    untrained = Arm(
        name="untrained",
        description="initial weights, adapted alike",
        checkpoint=None,
        inner=inner,
        num_episodes=few,
    )
    unadapted = Arm(
        name="no-adaptation",
        description="trained weights, no inner step",
        checkpoint=checkpoint,
        inner=inner.model_copy(update={"num_steps": 0}),
        num_episodes=few,
    )
    campaign = Campaign(config, (model, untrained, unadapted) if few else (model,), device)
    _ = campaign.episodes  # opened now, so that what is wrong with them is said before any work
    require_same_model(checkpoint, config, campaign.bank.image_shape)
    campaign.learner(model)
    return campaign


def judge_locally(config: Config, echo: Echo) -> Path:
    """Judge all that is missing in this process, without Ray, and write the report."""
    device = local_device(config.cluster)
    prepare_process(config.cluster, device)
    campaign = plan_campaign(config, device)
    progress = Progress(campaign.missing(), echo)
    for chunk in campaign.missing():
        progress.add(chunk, campaign.judge(chunk))
    return campaign.report()


class Progress:
    """Echoes a line for each finished chunk: running mean, rate, time left.

    Args:
        chunks: the work to come.
        echo: receives the lines.
    """

    def __init__(self, chunks: list[Chunk], echo: Echo) -> None:
        self._todo = sum(chunk.count for chunk in chunks)
        self._echo = echo
        self._started = time.perf_counter()
        self._accuracies: dict[str, list[float]] = {}
        self._done = 0

    def add(self, chunk: Chunk, accuracies: list[float]) -> None:
        """Take note of a finished chunk."""
        arm = self._accuracies.setdefault(chunk.arm, [])
        arm.extend(accuracies)
        self._done += chunk.count
        rate = self._done / (time.perf_counter() - self._started)
        self._echo(
            f"{self._done:>{len(str(self._todo))}}/{self._todo} episodes"
            f"  {chunk.arm} {100 * sum(arm) / len(arm):.2f}% over {len(arm)}"
            f"  {rate:.1f} episodes/s  {duration((self._todo - self._done) / rate)} left"
        )
