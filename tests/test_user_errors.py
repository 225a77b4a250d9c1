"""Contract 9, as a list: each mistake gives one message that says where, what and what instead.

Every case runs the real command (or, where a cluster would be needed, the function that judges
what it offers). It must end with exit code 2, show no traceback, say all of ``says``, and leave
every file as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image

from raymaml.cli import main
from raymaml.cluster.workers import plan_workers
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.data.bank import ClassImages, ImageBank, write_bank
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

    def rewrite(self, old: str, new: str) -> None:
        text = self.config_path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        self.config_path.write_text(text.replace(old, new), encoding="utf-8")

    def line_of(self, text: str) -> int:
        lines = self.config_path.read_text(encoding="utf-8").splitlines()
        return next(number for number, line in enumerate(lines, 1) if text in line)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mistake and what the message about it says (with {place} for the folder)."""

    name: str
    command: str = "train --local"
    overrides: tuple[str, ...] = ()
    mistake: Callable[[Place], object] = lambda _place: None
    says: tuple[str, ...]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def broken_source(place: Place) -> None:
    source = place.folder / "images"
    for split in ("train", "val", "test"):
        for number in range(3):
            images(source / split / f"{split}{number}", 3)
    (source / "train" / "train0" / "0.png").write_text("no image")
    (source / "train" / "empty").mkdir()
    images(source / "val" / "train1", 3)  # is in train too
    images(source / "test" / "few", 2)  # an episode needs 1 + 2
    # the bank of the config is there already: import elsewhere
    place.rewrite(f"bank: {place.folder / 'bank'}", f"bank: {place.folder / 'new'}")


def good_source(place: Place) -> None:
    for split in ("train", "val", "test"):
        for number in range(3):
            images(place.folder / "images" / split / f"{split}{number}", 3)


def foreign_folder(place: Place) -> None:
    good_source(place)
    (place.folder / "mine").mkdir()
    (place.folder / "mine" / "thesis.txt").write_text("irreplaceable")
    place.rewrite(f"bank: {place.folder / 'bank'}", f"bank: {place.folder / 'mine'}")


def pickle_bomb(place: Place) -> None:
    path = place.last / "params.pt"
    torch.save({"w": Path("x")}, path)  # no class but tensors and plain values is loaded
    card = json.loads((place.last / "checkpoint.json").read_text())
    card["files"]["params.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (place.last / "checkpoint.json").write_text(json.dumps(card))


def write_config(text: str | bytes) -> Callable[[Place], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda place: place.config_path.write_bytes(data)


def shard(place: Place) -> Path:
    return place.config.data.shards / "train" / "shard-00000.arrow"


CONFIG_CASES = [
    Case(
        name="config-missing",
        mistake=lambda place: place.config_path.unlink(),
        says=("{place}/config.yaml: cannot be read (No such file or directory)",),
    ),
    Case(
        name="config-is-a-folder",
        mistake=lambda place: folder_instead(place.config_path),
        says=("{place}/config.yaml: cannot be read (Is a directory)",),
    ),
    Case(
        name="config-not-yaml",
        mistake=write_config("name: [a\nseed: 1\n"),
        says=("{place}/config.yaml: is not YAML", "line 2"),
    ),
    Case(
        name="config-not-text",
        mistake=write_config(b"\xff\xfe\x00name"),
        says=("{place}/config.yaml: is not UTF-8 text; give a YAML config file",),
    ),
    Case(
        name="config-not-a-mapping",
        mistake=write_config("- name\n"),
        says=("{place}/config.yaml: holds no mapping (but a list); expected keys such as name",),
    ),
    Case(
        name="key-given-twice",
        mistake=lambda place: place.rewrite("tiny\nseed: 3\n", "tiny\nseed: 3\nseed: 4\n"),
        says=("{place}/config.yaml:3: seed is given twice (first at {place}/config.yaml:2)",),
    ),
    Case(
        name="key-unknown",
        mistake=lambda place: place.rewrite("  meta_batch_size: 3\n", "  meta_batchsize: 3\n"),
        says=("outer.meta_batchsize is unknown; did you mean meta_batch_size?", "config.yaml:"),
    ),
    Case(
        name="section-unknown",
        overrides=("iner.lr=0.1",),
        says=("command line: iner is unknown; did you mean inner?",),
    ),
    Case(
        name="key-missing",
        mistake=write_config("name: a\n"),
        says=("data is missing; it has no default", "outer is missing", "episodes is missing"),
    ),
    Case(
        name="not-a-number",
        overrides=("outer.num_steps=many",),
        says=("command line: outer.num_steps is 'many'; it should be a valid integer",),
    ),
    Case(
        name="true-is-no-number",
        overrides=("outer.meta_batch_size=true",),
        says=("outer.meta_batch_size is true; it should be a valid integer",),
    ),
    Case(
        name="number-out-of-range",
        overrides=("outer.lr=-1e-3",),
        says=("command line: outer.lr is -0.001; it should be greater than 0",),
    ),
    Case(
        name="number-not-finite",
        overrides=("inner.lr=.nan",),
        says=("command line: inner.lr is nan; it should be",),
    ),
    Case(
        name="choice-unknown",
        overrides=("inner.gradient=second_order",),
        says=(
            "inner.gradient is 'second_order'; it should be 'auto', 'unrolled', 'checkpointed',"
            " 'mixed_mode' or 'first_order'",
        ),
    ),
    Case(
        name="precision-of-gpus",
        overrides=("cluster.precision=tf32",),
        says=("cluster.precision is tf32, which GPUs alone have, and there is none to be used",),
    ),
    Case(
        name="source-unknown",
        overrides=("data.source.kind=imagenet",),
        says=("data.source", "imagenet", "'glyphs', 'omniglot', 'image-folder'"),
    ),
    Case(
        name="name-is-a-path",
        overrides=("name=../elsewhere",),
        says=("command line: name is '../elsewhere'; it should begin with a letter or digit",),
    ),
    Case(
        name="learned-head-with-other-ways",
        overrides=("episodes.test.num_ways=4",),
        says=("'test': 4", "model.head is learned", "set model.head: zero"),
    ),
    Case(
        name="momentum-without-sgd",
        overrides=("outer.momentum=0.9",),
        says=("outer.momentum is 0.9 but outer.optimizer is adam", "belongs to sgd"),
    ),
    Case(
        name="override-without-equals",
        overrides=("outer.lr",),
        says=("outer.lr: is not an override; write key.path=value, as in outer.lr=1e-3",),
    ),
    Case(
        name="override-into-a-value",
        overrides=("seed.x=1",),
        says=("seed.x=1: seed is a value, not a section",),
    ),
    Case(
        name="everything-wrong-at-once",
        overrides=("seed=-1", "model.widht=8", "inner.num_steps=2.5", "oops"),
        says=(
            "oops: is not an override",
            "seed is -1; it should be greater than or equal to 0",
            "model.widht is unknown; did you mean width?",
            "inner.num_steps is 2.5; it should be a valid integer",
        ),
    ),
]

DATA_CASES = [
    Case(
        name="bank-missing",
        overrides=("data.bank=nowhere",),
        says=("nowhere/bank.json: there is no image bank here", "`raymaml data import CONFIG`"),
    ),
    Case(
        name="bank-header-damaged",
        mistake=lambda place: (place.folder / "bank/bank.json").write_text("{"),
        says=("{place}/bank/bank.json: is damaged (not JSON)", "import it again"),
    ),
    Case(
        name="bank-pixels-truncated",
        mistake=lambda place: truncate(place.folder / "bank/images.arrow"),
        says=("{place}/bank/images.arrow: is truncated or altered (", "import it again"),
    ),
    Case(
        name="bank-of-another-size",
        overrides=("data.image_size=28",),
        says=("data.image_size is 28 but the bank {place}/bank holds images of 16 pixels",),
    ),
    Case(
        name="shards-missing",
        overrides=("data.shards=nowhere",),
        says=(
            "nowhere/train/manifest.json: there are no episode shards here",
            "nowhere/val/manifest.json: there are no episode shards here",
            "`raymaml data sample CONFIG`",
        ),
    ),
    Case(
        name="shard-truncated",
        mistake=lambda place: truncate(shard(place)),
        says=("{place}/shards/train/shard-00000.arrow: is truncated or altered (", "sample again"),
    ),
    Case(
        name="shard-altered",
        mistake=lambda place: flip(shard(place)),
        says=("{place}/shards/train/shard-00000.arrow: is altered (its SHA-256",),
    ),
    Case(
        name="shards-of-another-spec",
        overrides=("episodes.train.num_shots=2", "episodes.seed=4"),
        says=(
            "{place}/shards/train/manifest.json: spec.num_shots is 1, config and bank ask for 2",
            "{place}/shards/val/manifest.json: episodes.seed is 3, config and bank ask for 4",
            "or set data.shards to another path",
        ),
    ),
    Case(
        name="sample-over-other-shards",
        command="data sample",
        overrides=("episodes.val.num_queries=3",),
        says=("shards/val/manifest.json: spec.num_queries is 2, config and bank ask for 3",),
    ),
    Case(
        name="sample-beside-other-shards",  # nothing of the other splits is written before
        command="data sample",
        mistake=lambda place: shutil.rmtree(place.config.data.shards / "train"),
        overrides=("episodes.test.num_episodes=13", "episodes.val.num_ways=6", "model.head=zero"),
        says=(
            "split val: has 5 classes, episodes.val.num_ways is 6",
            "shards/test/manifest.json: spec.num_episodes is 10, config and bank ask for 13",
        ),
    ),
    Case(
        name="sample-more-than-the-bank-has",
        command="data sample",
        overrides=(
            "model.head=zero",
            "data.shards=nowhere",
            "episodes.train.num_ways=13",
        ),
        says=("split train: has 12 classes, episodes.train.num_ways is 13; add classes or lower",),
    ),
    Case(
        name="show-more-than-the-bank-has",
        command="data show --episode 0 --out sheet.png",
        overrides=("episodes.test.num_queries=8",),
        says=("the fewest are 8, of class test-0", "num_shots + num_queries = 9"),
    ),
    Case(
        name="import-without-source",
        command="data import",
        says=("data.source.path: {place}/images is not a folder; give one that exists",),
    ),
    Case(
        name="import-of-broken-images",
        command="data import",
        mistake=broken_source,
        says=(
            "images/train/train0/0.png: is not a readable image",
            "class empty of split train: has no images",
            "class train1: is in the splits train and val; keep it in one",
            "the fewest are 2, of class few",
        ),
    ),
    Case(
        name="import-into-another-bank",
        command="data import",
        mistake=good_source,
        says=("{place}/bank: holds another image bank", "set data.bank to another path"),
    ),
    Case(
        name="import-into-a-foreign-folder",
        command="data import",
        mistake=foreign_folder,
        says=("{place}/mine: exists and is not an image bank",),
    ),
    Case(
        name="omniglot-not-there",
        command="data import",
        overrides=("data.source={kind: omniglot, path: nowhere}",),
        says=("data.source.path: nowhere is not a folder; it must hold images_background.zip",),
    ),
]

RUN_CASES = [
    Case(
        name="resume-with-another-config",
        overrides=("inner.lr=0.2", "model.width=8"),
        says=(
            "{place}/runs/tiny: was started with inner.lr = 0.1, the config now says 0.2",
            "was started with model.width = 4, the config now says 8",
            "give the old value to resume, or another name to start again",
        ),
    ),
    Case(
        name="resume-with-another-schedule",
        overrides=("outer.schedule=cosine",),
        says=("outer.schedule = 'constant', the config now says 'cosine'",),
    ),
    Case(
        name="run-identity-damaged",
        mistake=lambda place: truncate(place.config.run_folder / "run.json"),
        says=("{place}/runs/tiny/run.json: is damaged",),
    ),
    Case(
        name="run-dir-is-a-file",
        mistake=lambda place: (place.folder / "file").write_text("mine"),
        overrides=("run_dir={place}/file",),
        says=("run_dir: {place}/file/tiny cannot be made a folder",),
    ),
    Case(
        name="checkpoint-weights-altered",
        mistake=lambda place: flip(place.last / "params.pt"),
        says=("checkpoint_00000002/params.pt: is damaged (its sha256 is not", "move {place}/runs"),
    ),
    Case(
        name="checkpoint-file-missing",
        mistake=lambda place: (place.last / "optimizer.pt").unlink(),
        says=("checkpoint_00000002/optimizer.pt: is damaged (it is missing)",),
    ),
    Case(
        name="checkpoint-card-torn",
        mistake=lambda place: truncate(place.last / "checkpoint.json"),
        says=("checkpoint_00000002/checkpoint.json: is damaged (",),
    ),
    Case(
        name="checkpoint-of-a-later-version",
        mistake=lambda place: (place.last / "checkpoint.json").write_text('{"schema_version": 9}'),
        says=("checkpoint.json: has schema_version 9, this raymaml reads 1", "that wrote it"),
    ),
    Case(
        name="checkpoint-is-a-pickle",
        mistake=pickle_bomb,
        says=("checkpoint_00000002/params.pt: is damaged (it holds more than tensors",),
    ),
    Case(
        name="test-before-training",
        command="test --local",
        overrides=("name=untrained",),
        says=("{place}/runs/untrained: holds no checkpoint; run `raymaml train CONFIG` first",),
    ),
    Case(
        name="test-with-another-model",
        command="test --local",
        overrides=("model.width=8",),
        says=("was trained with model.width = 4, config and bank now say 8",),
    ),
    Case(
        name="test-of-a-damaged-checkpoint",
        command="test --local",
        mistake=lambda place: flip(place.last / "params.pt"),
        overrides=("evaluation.checkpoint=last",),
        says=("checkpoint_00000002/params.pt: is damaged (",),
    ),
    Case(
        name="report-before-test",
        command="report",
        says=(
            "{place}/runs/tiny/test: 20 episodes in 7 chunks are not judged yet; run the command",
        ),
    ),
    Case(
        name="cuda-without-gpu",
        overrides=("cluster.device=cuda",),
        says=("cluster.device is cuda but this process sees no GPU; set cluster.device to cpu",),
    ),
    Case(
        name="frozen-nothing",
        overrides=("name=new", "inner.frozen=[encoder.conv9,head]"),
        says=("inner.frozen: 'encoder.conv9' matches nothing in the model; it has encoder.conv1",),
    ),
    Case(
        name="frozen-nothing-at-test",
        overrides=("name=new", "evaluation.inner.frozen=['nor*']"),
        says=("evaluation.inner.frozen: 'nor*' matches nothing in the model",),
    ),
    Case(
        name="norm-of-no-layer",
        overrides=("name=new", "model.norm={encoder.conv9: context, '*': running}"),
        says=("model.norm: 'encoder.conv9' matches nothing in the model; it has encoder.conv1",),
    ),
    Case(
        name="layer-without-norm-policy",
        overrides=("name=new", "model.norm={'encoder.conv[123]': context}"),
        says=("model.norm: encoder.conv4.norm match none of the patterns", 'add "*" as the last'),
    ),
    Case(
        name="own-encoder-not-there",
        overrides=("name=new", "model.width=null", "model.encoder=no_such_package:Encoder"),
        says=("model.encoder: no_such_package:Encoder cannot be imported", "No module named"),
    ),
    Case(
        name="own-encoder-without-arguments",
        overrides=("name=new", "model.width=null", "model.encoder=torch.nn:Linear"),
        says=("model.encoder: torch.nn:Linear cannot be", "model.encoder_args {}", "in_features"),
    ),
    Case(
        name="own-encoder-gives-images",
        overrides=("name=new", "model.width=null", "model.encoder=torch.nn:Identity"),
        says=("turns 2 images into [2, 1, 16, 16]; it must give features of shape [2, number",),
    ),
    Case(
        name="nothing-to-learn",
        overrides=(
            *("name=new", "model.width=null", "model.encoder=torch.nn:Flatten"),
            "model.norm=none",
            "model.head=zero",
        ),
        says=("model: has no parameters to learn: the encoder has none, and the head starts at",),
    ),
    Case(
        name="moments-of-other-channels",
        overrides=("name=new", "data.normalize={mean: [0, 0, 0], std: [1, 1, 1]}"),
        says=("data.normalize has 3 means and 3 stds, the bank {place}/bank 1 channels; give 1",),
    ),
    Case(
        name="milestones-without-schedule",
        overrides=("outer.milestones=[1]",),
        says=("outer.milestones is [1] but outer.schedule is constant: step needs milestones",),
    ),
    Case(
        name="momentum-of-adam",
        overrides=("outer.momentum=0.9",),
        says=("outer.momentum is 0.9 but outer.optimizer is adam",),
    ),
    Case(
        name="no-workers",
        overrides=("cluster.num_workers=0",),
        says=("command line: cluster.num_workers is 0; it should be", "'auto'"),
    ),
]

CASES = CONFIG_CASES + DATA_CASES + RUN_CASES


def test_the_list_is_long_enough_and_each_mistake_is_its_own() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.says for case in CASES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Where the one finished run of this module lies, once there is one."""
    return {"folder": tmp_path_factory.mktemp("finished") / "place"}


@pytest.fixture
def place(
    finished: dict[str, Any], make_config: Any, tiny_bank: ImageBank, tmp_path: Path
) -> Place:
    """A fresh copy of a finished run of two steps, with bank and shards, to do harm to."""
    original: Path = finished["folder"]
    steps = ("outer.num_steps=2", "outer.validate_every=2")
    if not original.exists():
        shutil.copytree(tiny_bank.folder, original / "bank")
        assert train_locally(make_config(original, *steps), lambda _line: None)
    folder = tmp_path / "place"
    shutil.copytree(original, folder)
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_one_message_and_changes_nothing(
    case: Case, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(place.folder)
    case.mistake(place)
    before = snapshot(place.folder)
    command, *options = case.command.split(" --")
    arguments = [*command.split(), str(place.config_path)]
    arguments += [word for option in options for word in f"--{option}".split()]
    arguments += [override.replace("{place}", str(place.folder)) for override in case.overrides]
    outcome = CliRunner().invoke(main, arguments)
    assert "Traceback" not in outcome.output
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert isinstance(outcome.exception, SystemExit)  # not one that python would print
    for text in case.says:
        assert text.replace("{place}", str(place.folder)) in outcome.output
    assert all(line.startswith("raymaml: ") for line in outcome.output.splitlines())
    assert snapshot(place.folder) == before


def test_the_list_has_no_case_that_a_correct_command_would_pass(place: Place) -> None:
    """The same commands without a mistake: what the cases see is the mistake's work."""
    for arguments in (["train", "--local"], ["test", "--local"], ["data", "sample"]):
        outcome = CliRunner().invoke(main, [*arguments, str(place.config_path)])
        assert outcome.exit_code == 0, outcome.output


def test_a_run_that_another_process_writes_is_refused(place: Place) -> None:
    before = snapshot(place.folder)
    with FileLock(place.config.run_folder / ".lock"):
        outcome = CliRunner().invoke(main, ["train", "--local", str(place.config_path)])
    assert outcome.exit_code == 2
    assert f"{place.config.run_folder}: another process is writing this run" in outcome.output
    assert snapshot(place.folder) == before


def test_images_too_small_for_the_encoder_are_refused(place: Place, tmp_path: Path) -> None:
    small = tmp_path / "small"
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    classes = [
        ClassImages(name=f"{split}{number}", split=split, images=noise)
        for split in ("train", "val", "test")
        for number in range(3)
    ]
    write_bank(small, classes, source="noise", licence="none", image_shape=(1, 8, 8))
    arguments = [
        str(place.config_path),
        f"data.bank={small}",
        f"data.shards={tmp_path / 'small-shards'}",
        "data.image_size=8",
        "name=small",
    ]
    assert CliRunner().invoke(main, ["data", "sample", *arguments]).exit_code == 0
    outcome = CliRunner().invoke(main, ["train", "--local", *arguments])
    assert outcome.exit_code == 2
    assert "data.image_size is 8, but model.encoder convnet4 halves it 4 times" in outcome.output
    assert not (place.config.run_dir / "small").exists()


@pytest.mark.parametrize(
    ("cluster", "resources", "says"),
    [
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
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    cluster: dict[str, Any], resources: dict[str, float], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan_workers(ClusterConfig(**cluster), resources)
    assert says in str(caught.value)


def test_a_cluster_that_fits_is_used_whole() -> None:
    assert plan_workers(ClusterConfig(), {"CPU": 8.0}) == (8, False)
    assert plan_workers(ClusterConfig(), {"CPU": 8.0, "GPU": 2.0}) == (2, True)
    assert plan_workers(ClusterConfig(device="cpu", num_workers=3), {"CPU": 8, "GPU": 2}) == (
        3,
        False,
    )
