"""A tiny run from images to a report, on made-up images, in a folder that is removed."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.data.importers import import_bank
from raymaml.doctor.finding import Finding, attempt
from raymaml.evaluation.plan import plan_test
from raymaml.evaluation.records import read_records
from raymaml.storage.files import make_folder, remove_folder, write_text
from raymaml.storage.place import Place
from raymaml.storage.temporary import held, own_name, remove_dead, temporary_folder
from raymaml.training.checkpoint import find_checkpoint, load_tensors, read_card
from raymaml.training.data import sample_shards
from raymaml.training.worker import train_locally
from raymaml.types import Params

MARKER = "marker.txt"
"""File of the folder that tells it from every other one."""
_NAME = "raymaml-doctor"
SIZE, CLASSES, IMAGES = 16, 4, 4
"""Pixels of a made-up image, classes of a split, and images of a class."""
STEPS = 2
Train = Callable[[Config, Callable[[str], None]], bool]
Judge = Callable[..., Place]


@contextlib.contextmanager
def rehearsal_folder(run_dir: Place | None) -> Iterator[Place]:
    """Make a folder inside ``run_dir``, or where this machine keeps temporary files, for the block.

    Raises:
        UserError: nothing can be written there.
    """
    base = Path(tempfile.gettempdir()) if run_dir is None else run_dir.absolute()
    made = []
    if isinstance(base, Path):
        made = [parent for parent in (base, *base.parents) if not parent.exists()]
        remove_dead(base, _NAME)
    folder = base / own_name(_NAME)
    make_folder(folder, "run_dir")
    try:
        with held(folder):
            write_text(folder / MARKER, secrets.token_hex(16))
            yield folder
    finally:
        remove_folder(folder, MARKER)
        remove_cache(cache_of(folder))
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for parent in made:
                parent.rmdir()


def remove_cache(cache: Path) -> None:
    """Remove what this machine has copied of the rehearsal's bank and episodes, if at a URI."""
    shutil.rmtree(cache, ignore_errors=True)


def cache_of(folder: Place) -> Path:
    """Return where each machine keeps its copies for the rehearsal in ``folder``."""
    return Path(tempfile.gettempdir()) / f"{folder.name}-cache"


def rehearse(
    folder: Place, cluster: ClusterConfig, train: Train, judge: Judge
) -> Iterator[Finding]:
    """Import, sample, train, go on, compare and test; the first failure is the last finding.

    Args:
        folder: an empty one, which all workers see.
        cluster: of the config that is checked.
        train: how training runs, ``train_locally`` or ``train_on_cluster``.
        judge: how judging runs.
    """
    config = _config(folder, cluster, "rehearsal", STEPS)
    stages = {
        "import and sample": partial(_make_data, config),
        "train": partial(_train, train, _config(folder, cluster, "rehearsal", STEPS - 1)),
        "go on": partial(_train, train, config),
        "same result": partial(_compare, config, _config(folder, cluster, "alone", STEPS)),
        "test": partial(_test, judge, config),
    }
    for name, stage in stages.items():
        started = time.perf_counter()
        for finding in attempt(f"rehearsal: {name}", stage):
            took = f", in {time.perf_counter() - started:.1f} s" if finding.status == "ok" else ""
            yield Finding(**{**vars(finding), "found": finding.found + took})
            if finding.status == "fail":
                return


def _make_data(config: Config) -> str:
    with temporary_folder() as temporary:
        _draw_images(temporary)
        source = config.data.source.model_copy(update={"path": temporary})
        bank = import_bank(config.data.model_copy(update={"source": source}), config.episodes)
    count = sum(shards.count for shards in sample_shards(config.data, config.episodes, bank))
    return f"{bank.num_images} made-up images, {count} episodes"


def _draw_images(folder: Path) -> None:
    """Write ``<split>/<class>/<image>.png``: a coarse pattern of each class, under noise."""
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in range(CLASSES):
            place = folder / split / f"{split}-{name}"
            place.mkdir(parents=True)
            pattern = np.kron(generator.integers(0, 2, (4, 4)) * 160, np.ones((4, 4)))
            for number in range(IMAGES):
                noise = generator.integers(0, 96, (SIZE, SIZE))
                Image.fromarray((pattern + noise).astype(np.uint8)).save(place / f"{number}.png")


def _config(folder: Place, cluster: ClusterConfig, name: str, steps: int) -> Config:
    episodes = {"num_ways": 2, "num_shots": 1, "num_queries": 2, "num_episodes": 4}
    content: dict[str, Any] = {
        "name": name,
        "run_dir": folder / "runs",
        "data": {
            "source": {"kind": "image-folder", "path": "removed", "mode": "gray"},
            "bank": folder / "bank",
            "shards": folder / "episodes",
            "cache": cache_of(folder),
            "image_size": SIZE,
        },
        "episodes": {"train": episodes, "val": episodes, "test": episodes},
        "model": {"width": 4},
        "inner": {"num_steps": 1, "lr": 0.1},
        "outer": {"num_steps": steps, "meta_batch_size": 2, "validate_every": STEPS},
        "evaluation": {"chunk_size": 2, "baseline_episodes": 0},
        "cluster": cluster.model_dump(),
    }
    return Config.model_validate(content)


def _train(train: Train, config: Config) -> str:
    if not train(config, lambda _line: None):
        raise UserError("it was interrupted; run the doctor again")
    step = read_card(find_checkpoint(config.run_folder, "last")).step
    return f"{step} of {STEPS} outer steps, one checkpoint"


def _compare(config: Config, alone: Config) -> str:
    """Compare the weights with those of a lone process without a break."""
    train_locally(alone, lambda _line: None)
    found, expected = _weights(config), _weights(alone)
    if all(torch.equal(found[name], expected[name]) for name in expected):
        return "equal to that of a lone process, bit by bit"
    furthest = max((found[name] - expected[name]).abs().max().item() for name in expected)
    if torch.cuda.is_available() or config.cluster.device == "cuda":
        return f"within {furthest:.1e} of that of a lone process"
    raise UserError(
        f"the weights are up to {furthest:.1e} from those of a lone process; give all nodes the"
        " same CPUs and the same versions of torch, or expect results that differ by as much"
    )


def _weights(config: Config) -> Params:
    path = find_checkpoint(config.run_folder, "last")
    return load_tensors(path, read_card(path), "params.pt", torch.device("cpu"))


def _test(judge: Judge, config: Config) -> str:
    judge(partial(plan_test, config), config.cluster, lambda _line: None)
    campaign = plan_test(config, torch.device("cpu"))
    (arm,) = campaign.arms
    records = read_records(campaign.records_of(arm), campaign.needed(arm), campaign.identity(arm))
    return f"{len(records)} episodes and a report"
