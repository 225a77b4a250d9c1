"""A short real training, from images to a report, in a folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS, ClusterConfig, Config
from raymaml.data.bank import write_bank
from raymaml.data.bank_format import in_memory
from raymaml.doctor import Finding, attempt
from raymaml.evaluation.campaign import Campaign
from raymaml.evaluation.run_test import plan_test
from raymaml.reports.write import write_test_report
from raymaml.storage.files import make_folder, remove_folder, write_text
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import held, own_name, remove_dead
from raymaml.training.checkpoint import find_checkpoint, weights_of
from raymaml.training.data import sample_shards
from raymaml.training.worker import train_locally

MARKER = "marker.txt"
"""A file of the folder, with random content: no other folder holds it."""
_NAME = "raymaml-doctor"
_SIZE = 16  # pixels of the side of an image: the fewest that the encoder takes


@contextlib.contextmanager
def rehearsal_folder(run_dir: Place | None) -> Iterator[Place]:
    """Make a folder in ``run_dir``, or in the nearest folder above it that exists, for the block.

    Without a ``run_dir`` it lies among the temporary files.

    Raises:
        UserError: it cannot be made.
    """
    base = Path(tempfile.gettempdir()) if run_dir is None else run_dir.absolute()
    if not is_remote(base):
        base = next(folder for folder in (base, *base.parents) if folder.exists())
        remove_dead(base, _NAME)
    folder = base / own_name(_NAME)
    make_folder(folder, "run_dir")
    try:
        with held(folder):
            write_text(folder / MARKER, secrets.token_hex(16))
            yield folder
    finally:
        remove_folder(folder, MARKER)
        remove_cache(folder.name)


def remove_cache(name: str) -> None:
    """Remove this machine's copies of the data of the rehearsal folder called ``name``."""
    shutil.rmtree(_cache(name), ignore_errors=True)


def _cache(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{name}-cache"


def rehearse(
    folder: Place,
    cluster: ClusterConfig,
    train: Callable[..., bool],
    judge: Callable[..., Campaign],
) -> Iterator[Finding]:
    """Make data, train, resume, compare and test; the first failure is the last finding.

    Args:
        folder: an empty one that all workers see.
        cluster: of the config that is checked.
        train: ``train_locally`` or ``train_on_cluster``.
        judge: ``judge_locally`` or ``judge_on_cluster``.
    """
    config, alone = (_config(folder, cluster, name, 2) for name in ("rehearsal", "alone"))
    stages = {
        "data": partial(_make_data, config),
        "train": partial(_train, train, _config(folder, cluster, "rehearsal", 1)),
        "resume": partial(_train, train, config),
        "same result": partial(_compare, config, alone),
        "test": partial(_test, judge, config),
    }
    checks = {f"rehearsal: {name}": stage for name, stage in stages.items()}
    yield from attempt(checks, until_failure=True)


def _config(folder: Place, cluster: ClusterConfig, name: str, num_steps: int) -> Config:
    data = {
        "source": {"kind": "glyphs"},  # is not read: the bank is there
        "bank": folder / "bank",
        "shards": folder / "episodes",
        "cache": _cache(folder.name),
        "image_size": _SIZE,
    }
    content = {
        "name": name,
        "run_dir": folder / "runs",
        "data": data,
        "episodes": {split: {"num_episodes": 4} for split in SPLITS},
        "outer": {"num_steps": num_steps},
        "evaluation": {"baseline_episodes": 0},
        "cluster": cluster.model_dump(),
    }
    return Config.model_validate(content)


def _make_data(config: Config) -> str:
    """Write a bank of noise, as small as 5-way 1-shot episodes allow, and sample them."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, _SIZE, _SIZE, 1), dtype=np.uint8)
    classes = [
        in_memory(f"{split}-{number}", split, images)
        for split in SPLITS
        for number, images in enumerate(noise)
    ]
    place, cache = config.data.bank, config.data.cache
    shape = (1, _SIZE, _SIZE)
    bank = write_bank(
        place, classes, source="noise", licence="none", image_shape=shape, cache=cache
    )
    count = sum(shards.count for shards in sample_shards(config.data, config.episodes, bank))
    return f"{bank.num_images} made-up images, {count} episodes"


def _train(train: Callable[..., bool], config: Config) -> str:
    if not train(config, lambda _line: None):
        raise UserError("it was interrupted", remedy="run the doctor again")
    return f"{config.outer.num_steps} of 2 outer steps"


def _compare(config: Config, alone: Config) -> str:
    """Compare the weights with those of one process that trains without a break."""
    train_locally(alone, lambda _line: None)
    paths = [find_checkpoint(run.run_folder, "last") for run in (config, alone)]
    cpu = torch.device("cpu")
    found, expected = (weights_of(path, cpu) for path in paths)
    differences = [(found[name] - expected[name]).abs().max() for name in expected]
    furthest = torch.stack(differences).max().item()
    if furthest == 0:
        return "the weights of one process, bit by bit"
    if torch.cuda.is_available() or config.cluster.device == "cuda":
        return f"within {furthest:.1e} of the weights of one process"
    raise UserError(
        f"the weights are up to {furthest:.1e} from those of one process",
        remedy="give all nodes the same CPUs and the same versions of torch, or expect results that"
        " differ by as much",
    )


def _test(judge: Callable[..., Campaign], config: Config) -> str:
    write_test_report(judge(partial(plan_test, config), config.cluster, lambda _line: None))
    return f"{config.episodes.test.num_episodes} episodes and a report"
