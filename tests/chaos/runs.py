"""The training run and the campaign: how far they are, and whether they end in the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.run_test import plan_test
from raymaml.training import checkpoint
from raymaml.training.checkpoint import find_checkpoint
from raymaml.training.metrics import METRICS_FILE, read_metrics

CONFIG = "configs/glyphs/quickstart.yaml"
SIZE = (
    *("data.source.images_per_class=20", "model.width=16"),
    *("episodes.train.num_episodes=800", "episodes.val.num_episodes=8"),
    *("outer.validate_every=30", "outer.checkpoint_every=10", "outer.log_every=2"),
    *("evaluation.chunk_size=10", "evaluation.baseline_episodes=100"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run and its campaign, in a run folder of their own."""

    folder: Path
    name: str
    steps: int
    episodes: int
    workers: int

    @property
    def overrides(self) -> list[str]:
        """What stands on the command line behind the config."""
        return [
            *(f"name={self.name}", f"run_dir={self.folder / 'runs'}", *SIZE),
            *(f"data.bank={self.folder / 'bank'}", f"data.shards={self.folder / 'episodes'}"),
            *(f"outer.num_steps={self.steps}", f"episodes.test.num_episodes={self.episodes}"),
            f"cluster.num_workers={self.workers}",
        ]

    def command(self, *verbs: str) -> list[str]:
        """Return the arguments of ``raymaml``."""
        return [*verbs, CONFIG, *self.overrides]

    @property
    def config(self) -> Config:
        """The config that the commands get."""
        return load_config(Path(CONFIG), tuple(self.overrides))

    def progress(self, verb: str) -> int:
        """Return the outer steps, or the chunks, that are done."""
        run = self.folder / "runs" / self.name
        if verb == "test":
            return len(list(run.glob("test/*/*/*.parquet")))
        return max((row["step"] for row in read_metrics(run / METRICS_FILE)), default=0)


def weights_of(job: Job) -> dict[str, bytes]:
    """Return the bits of the last weights of a run."""
    params = checkpoint.weights_of(
        find_checkpoint(job.config.run_folder, "last"), torch.device("cpu")
    )
    return {name: value.numpy().tobytes() for name, value in params.items()}


def records_of(job: Job) -> dict[str, pa.Table]:
    """Return the records of each arm with their identity: all columns but the seconds."""
    campaign = plan_test(job.config, torch.device("cpu"))
    return {
        arm.name: read_records(arm.records, arm.needed(), arm.identity).drop(["seconds"])
        for arm in campaign.arms
    }


def differences(found: Job, expected: Job) -> list[str]:
    """Say what of a disturbed job differs from the undisturbed one; nothing if it is equal."""
    weights, wanted = weights_of(found), weights_of(expected)
    problems = [name for name, bits in wanted.items() if weights[name] != bits]
    tables = records_of(found)
    for arm, table in records_of(expected).items():
        if not tables[arm].equals(table, check_metadata=True):
            problems.append(f"the records of {arm}")
    return [f"{found.name}: not the same: {problem}" for problem in problems]
