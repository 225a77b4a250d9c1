"""The training run and the campaign: how far they are, and whether they end in the same bits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.run_test import plan_test
from raymaml.training.checkpoint import find_checkpoint
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.types import Params

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


def weights_of(job: Job) -> tuple[Params, str]:
    """Return the last weights of a run, and a SHA-256 over their names and bits."""
    path = find_checkpoint(job.config.run_folder, "last") / "params.pt"
    params: Params = torch.load(path, weights_only=True)
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return params, digest.hexdigest()


def records_of(job: Job) -> dict[str, pa.Table]:
    """Return the records of each arm with their identity: all columns but the seconds."""
    campaign = plan_test(job.config, torch.device("cpu"))
    return {
        arm.name: read_records(arm.records, arm.needed(), arm.identity).drop(["seconds"])
        for arm in campaign.arms
    }


def differences(found: Job, expected: Job) -> list[str]:
    """Say what of a disturbed job differs from the undisturbed one; nothing if it is equal."""
    (params, digest), (wanted, wanted_digest) = weights_of(found), weights_of(expected)
    different = [name for name, value in wanted.items() if not torch.equal(params[name], value)]
    problems = [f"{found.name}: {name} differs" for name in different]
    if digest != wanted_digest:
        problems.append(f"{found.name}: weights have the hash {digest}, not {wanted_digest}")
    tables, wanted_tables = records_of(found), records_of(expected)
    return problems + [
        f"{found.name}: the records of {arm} differ"
        for arm, table in wanted_tables.items()
        if not tables[arm].equals(table, check_metadata=True)
    ]
