"""A run folder is enough by itself: no bank, no shards; older ones still serve."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers_faults import assert_same_bits, bits, quiet
from helpers_trained import run_as_before
from torch import Tensor, nn

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import in_memory
from raymaml.evaluation.run_test import plan_test
from raymaml.meta.learner import MetaLearner
from raymaml.training import state as state_module
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import sample_shards
from raymaml.training.state import TrainState, initial_state
from raymaml.training.tensor_file import can_be_kept, read_weights, weights_bytes
from raymaml.training.trained import TrainedModel, open_trained
from raymaml.training.worker import train_locally
from tests.conftest import tiny_classes

CPU = torch.device("cpu")
OWN = ("model.encoder=helpers_encoders:Plain", "model.width=null", "model.norm=none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a finished run, once a test has made it."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(make_config: Any, finished: Path, tmp_path: Path, tiny_bank: ImageBank) -> Config:
    """A run of its own with a bank of its own; norm ``running`` has moments that last."""
    if not (finished / "tiny").exists():
        changes = ("model.norm=running", "outer.num_steps=3")
        assert train_locally(make_config(finished / "tiny", *changes), quiet)
    shutil.copytree(finished / "tiny", tmp_path / "tiny")
    shutil.copytree(tiny_bank.folder, tmp_path / "bank")
    changes = ("model.norm=running", "outer.num_steps=3")
    config: Config = make_config("tiny", *changes)
    data = config.data.model_copy(update={"bank": tmp_path / "bank"})
    return config.model_copy(update={"data": data})


def alone(config: Config) -> Path:
    """Take bank, shards and config file away, and return the run folder at another place."""
    folder = Path(str(config.run_folder))
    shutil.rmtree(str(config.data.bank))
    place = folder.parents[1].parent / "elsewhere"
    folder.rename(place)
    shutil.rmtree(folder.parents[1])
    return place


def same_weights(found: MetaLearner, expected: MetaLearner) -> None:
    one, other = (learner.params | learner.moments for learner in (found, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_folder_alone_is_enough(run: Config, tiny_bank: ImageBank) -> None:
    expected = plan_test(run, CPU).arm("model").learners()[0]
    place = alone(run)
    found = open_trained(place, CPU)
    same_weights(found.learner, expected)
    assert found.learner.test_inner == expected.test_inner
    assert found.config.model == run.model
    assert found.preprocessing.image_shape == tiny_bank.image_shape
    assert (found.preprocessing.mean, found.preprocessing.std) == (tiny_bank.mean, tiny_bank.std)
    assert found.preprocessing.fit == "crop"  # of an image-folder
    assert found.train_classes == tuple(f"train-{number}" for number in range(12))
    path = place / found.checkpoint
    assert found.origin == read_card(path).files["params.safetensors"]
    for where in (place, str(place), path):
        same_weights(raymaml.load_learner(where), expected)
    for which in ("best", "last"):
        assert open_trained(place, CPU, which).checkpoint == find_checkpoint(place, which).name


def test_a_config_needs_no_bank_and_no_shards(run: Config) -> None:
    expected = plan_test(run, CPU).arm("model").learners()[0]
    shutil.rmtree(str(run.data.bank))
    shutil.rmtree(str(run.data.shards))
    same_weights(raymaml.load_learner(run), expected)
    assert open_trained(run, CPU).config == run


def test_safetensors_alone_reads_the_weights(run: Config) -> None:
    learner = open_trained(run, CPU).learner
    wanted = learner.params | learner.moments
    assert any("mean" in name for name in wanted)  # running moments are among them
    path = find_checkpoint(run.run_folder, "best") / "params.safetensors"
    found = safetensors.torch.load_file(path)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in wanted.items()
    }
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_pixels_become_the_tensors_that_training_saw(run: Config, tiny_bank: ImageBank) -> None:
    found = open_trained(run, CPU)
    rows = np.arange(5)
    pixels = tiny_bank.images(rows)
    made = np.stack([found.preprocessing.pixels(image) for image in pixels])
    assert np.array_equal(made, pixels)
    expected = plan_test(run, CPU).arm("model").episodes.loader.normalize(torch.tensor(pixels))
    assert torch.equal(found.preprocessing.tensor(made), expected)


def test_a_run_of_before_is_judged_and_goes_on_to_the_same_bits(
    run: Config, tmp_path: Path
) -> None:
    expected = plan_test(run, CPU).arm("model").learners()[0]
    run_as_before(Path(str(run.run_folder)))
    same_weights(plan_test(run, CPU).arm("model").learners()[0], expected)
    found = open_trained(run, CPU)
    same_weights(found.learner, expected)
    assert (found.preprocessing.fit, len(found.train_classes)) == ("crop", 12)
    outer = run.outer.model_copy(update={"num_steps": 6})
    longer = run.model_copy(update={"outer": outer})
    other = longer.model_copy(update={"run_dir": tmp_path / "undisturbed"})
    assert train_locally(longer, quiet)
    assert train_locally(other, quiet)
    assert_same_bits(longer, other)
    assert open_trained(longer.run_folder, CPU, "last").preprocessing == found.preprocessing


def test_a_run_of_before_without_its_bank_is_one_message(run: Config) -> None:
    run_as_before(Path(str(run.run_folder)))
    assert open_trained(run, CPU)
    shutil.rmtree(str(run.data.bank))
    for where in (run.run_folder, run):
        with pytest.raises(UserError, match="an earlier raymaml wrote it") as caught:
            open_trained(where, CPU)
        (problem,) = caught.value.problems
        assert "give the CONFIG of the run with its data.bank in place" in problem
    given = run.data.model_copy(update={"normalize": "none"})
    assert open_trained(run.model_copy(update={"data": given}), CPU).preprocessing.mean == (0.0,)


def test_a_bank_of_something_else_gives_no_moments(run: Config) -> None:
    run_as_before(Path(str(run.run_folder)))
    header = json.loads((Path(str(run.data.bank)) / "bank.json").read_text())
    (Path(str(run.data.bank)) / "bank.json").write_text(json.dumps(header | {"hash": "d" * 64}))
    with pytest.raises(UserError, match=r"bank_hash is .* and its moments are needed"):
        open_trained(run, CPU)


FORGED = {
    "preprocessing.mean": ([0.0], "preprocessing.mean is "),
    "preprocessing.fit": ("squash", "preprocessing.fit is 'squash', run.json says 'crop'"),
    "preprocessing.image_shape": ([1, 32, 32], "preprocessing.image_shape (1, 32, 32)"),
    "train_classes": (["x"], "train_classes are not those of run.json"),
}


@pytest.mark.parametrize("key", FORGED)
def test_a_card_that_says_something_else_than_its_run_is_refused(run: Config, key: str) -> None:
    value, says = FORGED[key]
    path = find_checkpoint(run.run_folder, "best") / "checkpoint.json"
    card = tree = json.loads(path.read_bytes())
    *sections, last = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[last] = value
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="restore it from a copy") as caught:
        open_trained(run.run_folder, CPU)
    assert says in str(caught.value)


def test_a_folder_that_names_code_is_not_run(run: Config) -> None:
    """`os:system` with a command would be one."""
    for path in Path(str(run.run_folder)).rglob("*.json"):
        tree = json.loads(path.read_text())
        model = tree.get("config", tree)["model"]
        model |= {"encoder": "os:system", "encoder_args": {"command": "touch x"}}
        model |= {"width": None, "norm": "none"}
        path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"model\.encoder is os:system, and code is not imported"):
        open_trained(run.run_folder, CPU)
    with pytest.raises(UserError, match=r"model\.encoder = 'os:system'"):
        open_trained(run, CPU)


def of_library(tmp_path: Path, make_config: Any, name: str, *overrides: str) -> Config:
    """A config for colour images, the tiny ones three times over."""
    path = make_config().run_dir.parent / "config.yaml"
    colour = [
        in_memory(each.name, each.split, np.repeat(images, 3, axis=-1))
        for each, (images,) in tiny_classes()
    ]
    folder = tmp_path / "colour"
    facts = {"source": "patterns", "licence": "none", "image_shape": (3, 16, 16)}
    bank = write_bank(folder / "bank", colour, **facts)
    places = (f"data.bank={folder}/bank", f"data.shards={folder}/shards", f"run_dir={folder}")
    small = ("outer.num_steps=1", "inner.num_steps=1", "model.width=null", f"model.encoder={name}")
    config = load_config(path, [*places, *small, *overrides])
    assert len(list(sample_shards(config.data, config.episodes, bank))) == 3
    return config


@pytest.mark.parametrize("encoder", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_a_run_folder_with_an_encoder_of_a_library_opens_without_its_first_weights(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    library, _, name = encoder.partition(":")
    module = pytest.importorskip(library)
    network = module.create_model(name) if library == "timm" else module.models.get_model(name)
    weights = tmp_path / "weights.pt"
    torch.save(network.state_dict(), weights)
    config = of_library(tmp_path, make_config, encoder, f"model.weights={weights}")
    assert train_locally(config, quiet)
    expected = plan_test(config, CPU).arm("model").learners()[0]
    weights.unlink()
    same_weights(open_trained(config.run_folder, CPU).learner, expected)
    same_weights(open_trained(config, CPU).learner, expected)

    for path in Path(str(config.run_folder)).rglob("*.json"):  # as of a run from `pretrained`
        tree = json.loads(path.read_text())
        tree.get("config", tree)["model"]["weights"] = "pretrained"
        path.write_text(json.dumps(tree))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it reaches for a network"))
    same_weights(open_trained(config.run_folder, CPU).learner, expected)

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{library} cannot be imported .*; pip install"):
        open_trained(config.run_folder, CPU)


def test_a_config_of_another_model_is_refused(run: Config) -> None:
    data = run.data.model_copy(update={"image_size": 32})
    model = run.model.model_copy(update={"width": 8})
    other = run.model_copy(update={"data": data, "model": model})
    with pytest.raises(UserError) as caught:
        open_trained(other, CPU)
    assert "(C, H, W) = (1, 16, 16), config and bank now say (1, 32, 16)" in str(caught.value)
    assert "model.width = 4" in str(caught.value)


class Odd(nn.Module):
    """Buffers of every kind: half, whole numbers, a scalar, shared memory, strides, none at all."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(2, 6)
        self.linear = nn.Linear(256, 4)
        self.turned = nn.Parameter(torch.randn(4, 3).T)
        self.register_buffer("bf16", torch.tensor([0.1, -0.0, torch.inf, torch.nan]).bfloat16())
        self.register_buffer("count", torch.tensor(2**62 + 1))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("top", both[0])
        self.register_buffer("whole", both)
        self.register_buffer("wide", torch.zeros(1).expand(5))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)) + self.turned.sum()


def raw(value: Tensor) -> tuple[object, ...]:
    flat = value.detach().reshape(-1).contiguous().view(torch.uint8)
    return value.dtype, tuple(value.shape), flat.numpy().tobytes()


def test_every_kind_of_tensor_comes_back_bit_for_bit(make_config: Any) -> None:
    config = make_config()
    model = nn.Sequential()
    model.encoder, model.head = Odd(), nn.Linear(4, 3)
    learner = MetaLearner(model, config.inner)
    state: TrainState = initial_state(learner, config.outer)
    weights = state.weights
    assert not weights["encoder.turned"].is_contiguous()
    assert len(weights) == 12
    found = read_weights(weights_bytes(weights), CPU)
    assert {name: raw(value) for name, value in found.items()} == {
        name: raw(value) for name, value in weights.items()
    }
    before = state.digest()  # of the bits of half and whole numbers too
    model.encoder.count += 1
    assert state.digest() != before
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) >= 11


def test_a_tensor_that_no_file_can_hold_is_found_before_training(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_be_kept(torch.zeros(2, 3).bfloat16())
    assert not can_be_kept(torch.zeros(2, dtype=torch.complex128))
    assert not can_be_kept(torch.zeros(2, 2).to_sparse())
    config = make_config("odd", *OWN)
    monkeypatch.setattr(state_module, "can_be_kept", lambda _value: False)
    with pytest.raises(UserError, match=r"model: checkpoints cannot hold encoder\.linear"):
        train_locally(config, quiet)
    assert not config.run_folder.exists()


def test_the_fields_of_a_trained_model_stay(run: Config) -> None:
    assert list(TrainedModel.__dataclass_fields__) == [
        *("learner", "config", "preprocessing", "train_classes", "checkpoint", "origin"),
        "encoder_source",
    ]
    assert bits(run.run_folder)
