"""Real runs of ``raymaml train`` beside what the model says of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymaml.bench.scaling.model import Step
from raymaml.config.base import Section
from raymaml.config.load import check_config
from raymaml.config.schema import SPLITS, Config
from raymaml.data.importers import import_bank
from raymaml.training.data import open_bank, sample_shards
from raymaml.training.metrics import METRICS_FILE, read_metrics

Train = Callable[[Sequence[Config], int], Iterable[float]]
"""Train with each config on a cluster of so many logical CPUs; seconds of each run."""
_PARTS = 6
"""Rows of metrics of a run, of which the first is the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run, and its prediction."""

    config: str
    workers: int
    meta_batch: int
    predicted: float
    """Episodes/s."""
    measured: float
    """Episodes/s after the warm-up."""
    start_seconds: float
    """What the run took beside its outer steps."""

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted / self.measured


def checkable(folder: Path) -> list[Config]:
    """Return configs on raymaml's own glyphs: a small gradient that is quick, and a large one."""
    return [
        _glyphs(folder, "glyphs-convnet4-32", {"encoder": "convnet4", "width": 32}, 12),
        _glyphs(folder, "glyphs-resnet12", {"encoder": "resnet12"}, 4),
    ]


def _glyphs(folder: Path, name: str, model: dict[str, Any], meta_batch: int) -> Config:
    """5-way 1-shot on 28x28, 3 queries in training: as the quickstart."""
    split = {"num_ways": 5, "num_shots": 1, "num_queries": 3, "num_episodes": 1}
    tree = {
        "name": name,
        "data": {
            "source": {"kind": "glyphs"},
            "bank": str(folder / "bank"),
            "shards": str(folder / "shards"),
            "image_size": 28,
        },
        "episodes": {"train": split, "val": split, "test": split},
        "model": model,
        "inner": {"num_steps": 1, "lr": 0.1},
        "outer": {"num_steps": 1, "meta_batch_size": meta_batch},
        "cluster": {"device": "cpu"},
    }
    return check_config(tree, name)


def run_config(config: Config, folder: Path, workers: int, num_steps: int) -> Config:
    """Return ``config`` for a short run of its training alone, in ``folder``."""
    quiet = {
        "num_steps": num_steps,
        "log_every": num_steps // _PARTS,
        "validate_every": num_steps,
        "checkpoint_every": None,
        "schedule": "constant",
        "milestones": (),
        "warmup_steps": 0,
    }
    counts = dict.fromkeys(SPLITS, 1) | {"train": num_steps * config.outer.meta_batch_size}
    changed: dict[str, Any] = {
        split: _with(config.episodes.of(split), {"num_episodes": counts[split]}) for split in SPLITS
    }
    return config.model_copy(
        update={
            "name": f"{config.name}-{workers}-workers",
            "run_dir": folder,
            "data": _with(config.data, {"shards": folder / f"{config.name}-shards"}),
            "episodes": _with(config.episodes, changed),
            "outer": _with(config.outer, quiet),
            "cluster": _with(config.cluster, {"num_workers": workers, "device": "cpu"}),
        }
    )


def _with(section: Section, changes: dict[str, Any]) -> Any:
    return section.model_copy(update=changes)


def steps_of(lone: Step, seconds: float) -> int:
    """Return outer steps that a lone worker needs so many seconds for: whole parts, of 2 to 500."""
    a_part = round(seconds / _PARTS / lone.seconds)
    return _PARTS * min(max(a_part, 2), 500)


def check(
    config: Config,
    steps: Sequence[Step],
    folder: Path,
    *,
    lone: Step,
    seconds: float,
    train: Train,
) -> list[Checked]:
    """Run ``config`` with each number of workers, and compare.

    Args:
        config: whose bank is there, or is made of glyphs.
        steps: predictions.
        folder: for shards and runs.
        lone: prediction for one worker, by which the runs get their length.
        seconds: of a lone worker, about.
        train: what trains.

    Raises:
        UserError: the bank is missing or does not fit.
    """
    num_steps = steps_of(lone, seconds)
    configs = [run_config(config, folder, step.workers, num_steps) for step in steps]
    if config.data.source.kind == "glyphs" and not config.data.bank.exists():
        import_bank(config.data, config.episodes)
    list(sample_shards(configs[0], open_bank(config)))
    cpus = max(step.workers for step in steps) + 1  # for the tasks that read
    found = []
    for run, step, wall in zip(configs, steps, train(configs, cpus), strict=True):
        rate = rate_of(read_metrics(run.run_folder / METRICS_FILE))
        found.append(
            Checked(
                config=config.name,
                workers=step.workers,
                meta_batch=step.meta_batch,
                predicted=step.episodes_per_second,
                measured=rate,
                start_seconds=max(0.0, wall - num_steps * step.meta_batch / rate),
            )
        )
    return found


def rate_of(rows: Sequence[dict[str, Any]]) -> float:
    """Return the episodes/s of all training rows of the metrics but the first."""
    rates = [row["episodes_per_second"] for row in rows if "episodes_per_second" in row]
    return float(statistics.harmonic_mean(rates[1:]))  # rows are of equally many episodes
