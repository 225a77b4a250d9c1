"""Contract 9, as a list: each mistake gives one message with its place and remedy.

The message ends the command with exit code 2 and without a traceback, and every file stays as it
was. Mistakes that need no run are in ``test_newcomers.py`` and ``config/``.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from PIL import Image

from raymaml.cli import main
from raymaml.cluster.workers import plan_workers
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import in_memory
from raymaml.training.worker import train_locally


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder of one's own to make mistakes in: config, bank, shards and a finished run."""

    folder: Path
    config: Config

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def last(self) -> Path:
        return self.config.run_folder / "checkpoint_00000002"

    @property
    def shard(self) -> Path:
        return self.folder / "shards/train/shard-00000.arrow"

    def run(self, line: str) -> Result:
        command, *overrides = shlex.split(line.replace("{place}", str(self.folder)))
        words = command.replace("-", " ").split()
        local = ["--local"] if command in ("train", "test") else []
        return CliRunner().invoke(main, [*words, *local, str(self.config_path), *overrides])


OF_A_COMMAND = {
    # settings that contradict the machine, each other, or the model
    "train cluster.precision=tf32": "cluster.precision is tf32, which GPUs alone have",
    "train cluster.device=cuda": "cluster.device is cuda but this process sees no GPU",
    "train episodes.test.num_ways=4": "'test': 4 ... model.head is learned ... model.head: zero",
    "train name=new inner.frozen=[encoder.conv9,head]": (
        "inner.frozen: 'encoder.conv9' matches nothing in the model; it has encoder.conv1"
    ),
    "train name=new evaluation.inner.frozen=['nor*']": "evaluation.inner.frozen: 'nor*' matches",
    "train name=new 'model.norm={encoder.conv9: context, \"*\": running}'": (
        "model.norm: 'encoder.conv9' matches nothing in the model; it has encoder.conv1"
    ),
    "train name=new 'model.norm={\"encoder.conv[123]\": context}'": (
        'model.norm: encoder.conv4.norm match none of the patterns ... add "*" as the last'
    ),
    "train name=new model.width=null model.encoder=no_such_package:Encoder": (
        "model.encoder: no_such_package:Encoder cannot be imported ... No module named"
    ),
    "train name=new model.width=null model.encoder=helpers_encoders:Linear": (
        "model.encoder: helpers_encoders:Linear cannot be ... model.encoder_args {} ... in_features"
    ),
    "train name=new model.width=null model.encoder=helpers_encoders:Identity": (
        "turns 2 images into [2, 1, 16, 16]; it must give features of shape [2, number"
    ),
    "train name=new 'model={encoder: helpers_encoders:Flatten, norm: none, head: zero}'": (
        "model: has no parameters to learn: the encoder has none, and the head starts at"
    ),
    "train name=new 'data.normalize={mean: [0, 0, 0], std: [1, 1, 1]}'": (
        "data.normalize has 3 means and 3 stds, the bank {place}/bank 1 channels; give 1"
    ),
    # data
    "train data.bank=nowhere": (
        "nowhere/bank.json: there is no image bank here ... `raymaml data import CONFIG`"
    ),
    "train data.image_size=28": (
        "data.image_size is 28 but the bank {place}/bank holds images of 16 pixels"
    ),
    "train data.shards=nowhere": (
        "nowhere/train/manifest.json: there are no episode shards here ... "
        "nowhere/val/manifest.json: there are no episode shards here ... `raymaml data sample"
    ),
    "train episodes.train.num_shots=2 episodes.seed=4": (
        "{place}/shards/train/manifest.json: spec.num_shots is 1, config and bank ask for 2 ... "
        "or set data.shards to another path ... "
        "{place}/shards/val/manifest.json: episodes.seed is 3, config and bank ask for 4"
    ),
    "data-sample episodes.val.num_queries=3": (
        "shards/val/manifest.json: spec.num_queries is 2, config and bank ask for 3"
    ),
    "data-sample model.head=zero data.shards=nowhere episodes.train.num_ways=13": (
        "split train: has 12 classes, episodes.train.num_ways is 13; add classes or lower"
    ),
    "data-show --episode=0 --out=sheet.png episodes.test.num_queries=8": (
        "the fewest are 8, of class test-0 ... num_shots + num_queries = 9"
    ),
    "data-import": "data.source.path: {place}/images is not a folder; give one that exists",
    "data-import 'data.source={kind: omniglot, path: nowhere}'": (
        "data.source.path: nowhere is not a folder; give one that exists"
    ),
    # the run
    "train inner.lr=0.2 model.width=8": (
        "{place}/runs/tiny: was started with model.width = 4, the config now says 8 ... "
        "was started with inner.lr = 0.1, the config now says 0.2 ... "
        "give the old value to resume, or another name to start again"
    ),
    "train outer.schedule=cosine": "outer.schedule = 'constant', the config now says 'cosine'",
    "test name=untrained": (
        "{place}/runs/untrained: holds no checkpoint; run `raymaml train CONFIG` first"
    ),
    "test model.width=8": "was trained with model.width = 4, config and bank now say 8",
    "report": "{place}/runs/tiny/test: 20 episodes in 7 chunks are not judged yet; run the command",
}
"""Commands (with dashes for spaces) and overrides, and the parts of the message in their order."""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def good_source(place: Place) -> None:
    for split in ("train", "val", "test"):
        for number in range(9):
            path = place.folder / f"images/{split}/{split}{number // 3}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 64).save(path)


OF_A_FILE: list[tuple[Callable[[Place], object], str, str]] = [
    (
        lambda place: truncate(place.folder / "bank/images.arrow"),
        "train",
        "{place}/bank/images.arrow: is truncated or altered ( ... import it again",
    ),
    (
        lambda place: truncate(place.shard),
        "train",
        "{place}/shards/train/shard-00000.arrow: is truncated or altered ( ... sample again",
    ),
    (  # nothing of the other splits is written before
        lambda place: shutil.rmtree(place.folder / "shards/train"),
        "data-sample episodes.test.num_episodes=13 episodes.val.num_ways=6 model.head=zero",
        "split val: has 5 classes, episodes.val.num_ways is 6 ... "
        "shards/test/manifest.json: spec.num_episodes is 10, config and bank ask for 13",
    ),
    (
        good_source,
        "data-import",
        "{place}/bank: holds another image bank ... set data.bank to another path",
    ),
    (
        lambda place: truncate(place.config.run_folder / "run.json"),
        "train",
        "{place}/runs/tiny/run.json: is damaged",
    ),
    (
        lambda place: (place.folder / "file").write_text("mine"),
        "train run_dir={place}/file",
        "run_dir: {place}/file/tiny cannot be made a folder",
    ),
    (
        lambda place: truncate(place.last / "params.safetensors"),
        "train",
        "params.safetensors: is damaged (its sha256 is not ... move {place}/runs",
    ),
    (
        lambda place: truncate(place.last / "params.safetensors"),
        "test evaluation.checkpoint=last",
        "checkpoint_00000002/params.safetensors: is damaged (",
    ),
]
"""Damage to files, and a command as above; ``{place}`` stands for the folder."""
CASES = [(lambda _place: None, line, says) for line, says in OF_A_COMMAND.items()] + OF_A_FILE


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one finished run of this module lies, once there is one."""
    return tmp_path_factory.mktemp("finished") / "place"


@pytest.fixture
def place(finished: Path, make_config: Any, tiny_bank: ImageBank, tmp_path: Path) -> Place:
    """A fresh copy of a finished run of two steps, with bank and shards, to do harm to."""
    steps = ("outer.num_steps=2", "outer.validate_every=2")
    if not finished.exists():
        shutil.copytree(tiny_bank.folder, finished / "bank")
        assert train_locally(make_config(finished, *steps), lambda _line: None)
    folder = tmp_path / "place"
    shutil.copytree(finished, folder)
    return Place(folder=folder, config=make_config(folder, *steps, f"data.bank={folder / 'bank'}"))


def snapshot(folder: Path) -> dict[str, str]:
    """Name and content of every file and folder, but for locks, which hold nothing."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
        if path.name not in {".lock", ".writer"}
    }


@pytest.mark.parametrize(("mistake", "line", "says"), CASES, ids=[case[2][:50] for case in CASES])
def test_a_mistake_is_one_message_and_changes_nothing(
    mistake: Callable[[Place], object],
    line: str,
    says: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(place.folder)
    mistake(place)
    before = snapshot(place.folder)
    outcome = place.run(line)
    assert "Traceback" not in outcome.output
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert isinstance(outcome.exception, SystemExit)  # not one that python would print
    for text in says.replace("{place}", str(place.folder)).split(" ... "):
        assert text in outcome.output
    assert all(line.startswith("raymaml: ") for line in outcome.output.splitlines())
    assert snapshot(place.folder) == before


def test_without_a_mistake_the_same_commands_succeed(place: Place) -> None:
    for line in ("train", "test", "data-sample"):
        outcome = place.run(line)
        assert outcome.exit_code == 0, outcome.output


def test_a_run_that_another_process_writes_is_refused(place: Place) -> None:
    with FileLock(place.config.run_folder / ".lock"):
        outcome = place.run("train")
    assert outcome.exit_code == 2
    assert f"{place.config.run_folder}: another process is writing this run" in outcome.output


def test_images_too_small_for_the_encoder_are_refused(place: Place) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    classes = [
        in_memory(f"{split}{number}", split, noise)
        for split in ("train", "val", "test")
        for number in range(3)
    ]
    small = place.folder / "small"
    write_bank(small, classes, source="noise", licence="none", image_shape=(1, 8, 8))
    changes = "data.bank={place}/small data.shards={place}/few data.image_size=8 name=small"
    assert place.run(f"data-sample {changes}").exit_code == 0
    outcome = place.run(f"train {changes}")
    assert outcome.exit_code == 2
    assert "data.image_size is 8, but model.encoder convnet4 halves it 4 times" in outcome.output
    assert not (place.config.run_dir / "small").exists()


CLUSTERS: list[tuple[dict[str, Any], dict[str, float], str]] = [
    (
        {"num_workers": 5, "device": "cpu"},
        {"CPU": 2.0},
        "cluster.num_workers is 5 but the Ray cluster has 2 CPU cores; use at most 2, or auto",
    ),
    (
        {"num_workers": 3},
        {"CPU": 8.0, "GPU": 2.0},
        "cluster.num_workers is 3 but the Ray cluster has 2 GPUs; use at most 2, or auto",
    ),
    (
        {"device": "cuda"},
        {"CPU": 8.0},
        "cluster.device is cuda but the Ray cluster has no GPUs; set cluster.device to what",
    ),
    ({}, {}, "cluster.device is auto but the Ray cluster has no CPU cores"),
]


def test_a_cluster_that_is_too_small_is_refused_and_one_that_fits_is_used_whole() -> None:
    for cluster, resources, says in CLUSTERS:
        with pytest.raises(UserError) as caught:
            plan_workers(ClusterConfig(**cluster), resources)
        assert says in str(caught.value)
    three = ClusterConfig(device="cpu", num_workers=3)
    assert plan_workers(ClusterConfig(), {"CPU": 8.0}) == (8, False)
    assert plan_workers(ClusterConfig(), {"CPU": 8.0, "GPU": 2.0}) == (2, True)
    assert plan_workers(three, {"CPU": 8, "GPU": 2}) == (3, False)
