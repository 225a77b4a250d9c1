"""``model.weights``: files of all kinds, names of all kinds, and the identity of a run."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor

import raymaml
from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config
from raymaml.evaluation.run_test import plan_test
from raymaml.models import build_model, plain_model
from raymaml.storage.files import sha256_of_file
from raymaml.training import weights as weights_module
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.matching import copy_matching
from raymaml.training.run import Run, open_run
from raymaml.training.worker import train_locally

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (1, 16, 16)
CPU = torch.device("cpu")


def state(seed: int = 77, width: int = 4, **model: Any) -> dict[str, Tensor]:
    """A state of an encoder: ``conv1.conv.weight``, ..., as of a model trained elsewhere."""
    config = ModelConfig(width=width, **model)
    network = plain_model(config, image_shape=SHAPE, num_ways=3, seed=seed)
    return dict(network.encoder.state_dict())


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def copied(content: object, **model: Any) -> tuple[dict[str, Tensor], str]:
    config = ModelConfig(width=4, **model)
    network = build_model(config, image_shape=SHAPE, num_ways=3, seed=0)
    text = copy_matching(network, content, "file.pt")
    return dict(network.state_dict()), text


def refused(content: object, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        copied(content, **model)
    return str(caught.value)


def opened(make_config: Any, path: Path, *overrides: str) -> Run:
    return open_run(make_config("tiny", f"model.weights={path}", *overrides), CPU)


def weight_of(run: Run) -> Tensor:
    return run.learner.params["encoder.conv1.conv.weight"].detach()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_file_gives_the_first_weights_and_its_hash_to_the_identity(
    make_config: Any, tmp_path: Path, name: str
) -> None:
    path = saved(tmp_path / name, state())
    run = opened(make_config, path)
    assert torch.equal(weight_of(run), state()["conv1.conv.weight"])
    assert not torch.equal(weight_of(run), state(seed=78)["conv1.conv.weight"])
    assert run.identity.of_run()["weights_hash"] == sha256_of_file(path)
    line = run.introduction(CPU, 1).splitlines()[0]
    assert line.startswith(f"{run.folder}: starts from {path} (sha256 ")
    assert line.endswith("16 tensors; left over the running moments, which model.norm does not use")
    assert not run.folder.exists()  # nothing is written yet


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder.", "net.backbone."])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_the_prefix_of_most_names_counts(prefix: str, key: str | None) -> None:
    tensors = prefixed(prefix, state()) | {"epoch": torch.tensor(3)}
    found, _ = copied(tensors if key is None else {key: tensors, "epoch": 3})
    assert all(
        torch.equal(found[f"encoder.{name}"], value)
        for name, value in state().items()
        if name.split(".")[-1] in ("weight", "bias")
    )


def test_a_head_is_taken_where_it_fits_and_left_over_where_not() -> None:
    fits, other = torch.randn(3, 4), torch.randn(64, 4)
    found, text = copied(prefixed("encoder.", state()) | {"head.weight": fits})
    assert torch.equal(found["head.weight"], fits)
    assert "left over head" not in text
    found, text = copied(prefixed("encoder.", state()) | {"head.weight": other, "fc.bias": fits})
    assert found["head.weight"].shape == (3, 4)
    assert "; left over head.weight, fc.bias;" in text


def test_a_whole_number_of_the_encoder_is_taken_as_it_is() -> None:
    """As ``relative_position_index`` of torchvision's Swin; a weight is never taken from one."""
    network = build_model(ModelConfig(width=4), image_shape=SHAPE, num_ways=3, seed=0)
    network.encoder.register_buffer("order", torch.tensor([0, 1]))
    copy_matching(network, prefixed("module.", state() | {"order": torch.tensor([1, 0])}), "f")
    assert network.encoder.get_buffer("order").tolist() == [1, 0]
    wrong = state() | {"conv2.conv.bias": torch.tensor([1, 2, 3, 4])}
    assert refused(wrong).startswith("model.weights: file.pt lacks 1 of the 16 weights of the enc")


def test_the_encoder_must_be_there_as_a_whole() -> None:
    some = {name: value for name, value in state().items() if not name.startswith("conv2.")}
    problem = refused(some)
    assert "file.pt lacks 4 of the 16 weights of the encoder: conv2.conv.weight, conv2." in problem
    assert "it holds conv1.conv.weight" in problem
    problem = refused({"stem.weight": torch.zeros(2)})
    assert "lacks 16 of the 16" in problem
    assert "it holds stem.weight" in problem
    assert "lacks 16 of the 16" in refused([1, 2])
    assert "it holds nothing" in refused({})


def test_shapes_that_do_not_fit_are_named() -> None:
    problem = refused(prefixed("module.", state(width=8)))
    assert "module.conv1.conv.weight has [8, 1, 3, 3], the encoder needs [4, 1, 3, 3];" in problem
    assert "and 11 more" in problem


def test_an_encoder_that_is_there_twice_is_not_guessed() -> None:
    twice = prefixed("online.", state()) | prefixed("target.", state(seed=78))
    assert "holds the encoder 2 times: online.*, target.*; save one" in refused(twice)


def test_learned_rates_of_a_run_are_no_encoder() -> None:
    own = prefixed("encoder.", state())
    rates = {f"rule.lr.{name}": torch.full_like(value, 0.1) for name, value in own.items()}
    after, text = copied(rates | own)
    assert after["encoder.conv1.conv.weight"].equal(own["encoder.conv1.conv.weight"])
    assert "left over rule.lr.encoder.conv1.conv.weight" in text


def test_running_moments_go_to_the_policy_that_keeps_them() -> None:
    tensors = state()
    tensors["conv1.norm.running_mean"] += 2
    found, text = copied(tensors, norm="running")
    assert torch.equal(found["encoder.conv1.norm.mean"], torch.full((4,), 2.0))
    assert text == "24 tensors"
    found, text = copied(prefixed("encoder.", found_encoder(found)), norm="running")
    assert torch.equal(found["encoder.conv1.norm.mean"], torch.full((4,), 2.0))
    without = {name: value for name, value in tensors.items() if "running" not in name}
    assert copied(without, norm="running")[1].startswith("16 tensors; missing conv1.norm.running_m")
    assert "missing conv1.norm.alpha_scale" in copied(tensors, norm="tasknorm_i")[1]


def found_encoder(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = ((name.removeprefix("encoder."), value) for name, value in found.items())
    return {name: value for name, value in own if not name.startswith("head")}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a text, no weights", "is no safetensors file and no torch state dict"),
        (b"\x08\0\0\0\0\0\0\0{broken}", "is no safetensors file and no torch state dict"),
        (pickle.dumps(print), "is no safetensors file and no torch state dict"),
        (None, "cannot be read (No such file or directory); give a safetensors file"),
    ],
)
def test_a_file_that_holds_no_tensors_is_one_message(
    make_config: Any, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "w.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        opened(make_config, path)
    (found,) = caught.value.problems
    assert found.startswith(f"model.weights: {path} ")
    assert problem in found


def test_a_folder_that_is_no_run_is_one_message(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(it is a folder without a checkpoint\)"):
        opened(make_config, tmp_path)


def test_the_config_for_own_images_shows_both_ways() -> None:
    lines = (ROOT / "configs" / "own_images.yaml").read_text(encoding="utf-8").splitlines()
    shown = [line.removeprefix("# ") for line in lines if line.startswith("# model: {")]
    models = [ModelConfig.model_validate(yaml.safe_load(line)["model"]) for line in shown]
    assert [model.weights for model in models] == ["pretrained", "my_weights.safetensors"]


@pytest.fixture
def trained(make_config: Any) -> Config:
    config: Config = make_config("first", "outer.num_steps=3")
    assert train_locally(config, lambda _line: None)
    return config


def test_a_run_of_raymaml_gives_its_best_checkpoint(make_config: Any, trained: Config) -> None:
    best = find_checkpoint(trained.run_folder, "best")
    weights = raymaml.load_learner(trained).params
    for place in (trained.run_folder, best):
        run = opened(make_config, place)
        assert all(torch.equal(value, weights[name]) for name, value in run.learner.params.items())
        assert run.identity.weights_hash == read_card(best).files["params.safetensors"]
    narrow = r"has other shapes: encoder\.conv1\.conv\.weight has \[4, 1, 3, 3\], the encoder need"
    with pytest.raises(UserError, match=narrow):
        opened(make_config, trained.run_folder, "model.width=2")


def test_a_norm_of_each_inner_step_starts_from_the_one_that_there_was() -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
    network = build_model(
        ModelConfig(width=4, norm={"policy": "running", "per_step": "both"}),
        image_shape=SHAPE,
        num_ways=3,
        seed=0,
        num_steps=3,
    )
    content = state()
    content["conv1.norm.weight"] = weight
    content["conv2.norm.running_var"] = torch.arange(4.0)[None]  # of a single step
    copy_matching(network, content, "file.pt")
    own = network.state_dict()
    assert torch.equal(own["encoder.conv1.norm.weight"], weight.expand(3, 4))
    assert torch.equal(own["encoder.conv2.norm.var"], torch.arange(4.0).expand(3, 4))
    content["conv1.norm.weight"] = torch.ones(2, 4)  # of another number of steps
    with pytest.raises(
        UserError, match=r"conv1\.norm\.weight has \[2, 4\], the encoder needs \[3,"
    ):
        copy_matching(network, content, "file.pt")


def test_a_run_goes_on_without_its_weights_but_not_from_others(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "w.pt", state())
    overrides = (f"model.weights={path}", "outer.num_steps=1")
    assert train_locally(make_config("tiny", *overrides), lambda _line: None)
    config = make_config("tiny", *overrides[:1], "outer.num_steps=2")
    recorded = json.loads((config.run_folder / "run.json").read_text())["weights_hash"]

    def not_called(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(weights_module, "copy_matching", not_called)
    assert open_run(config, CPU).identity.weights_hash == recorded
    content = path.read_bytes()
    saved(path, state(seed=78))
    with pytest.raises(UserError, match=r"was started from other model\.weights \(sha256 "):
        open_run(config, CPU)
    path.unlink()
    assert train_locally(config, lambda _line: None)
    other = tmp_path / "other.pt"
    other.write_bytes(content)
    with pytest.raises(UserError, match=r"was started with model\.weights = "):
        train_locally(make_config("tiny", f"model.weights={other}"), lambda _line: None)


def test_the_untrained_baseline_starts_from_the_weights(make_config: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", state())
    config = make_config("tiny", f"model.weights={path}", "outer.num_steps=1")
    assert train_locally(config, lambda _line: None)
    arm = plan_test(config, CPU).arm("untrained")
    assert torch.equal(
        arm.learners()[0].params["encoder.conv1.conv.weight"], state()["conv1.conv.weight"]
    )
    digest = sha256_of_file(path)
    assert arm.identity["weights"] == f"initial, seed 3, from {digest}"
    path.unlink()
    main = plan_test(config, CPU).arm("model")  # what was trained needs them no more
    assert main.learners()[0].params


PRETRAINED = "model.weights=pretrained"


def test_pretrained_belongs_to_libraries(make_config: Any) -> None:
    with pytest.raises(UserError, match=r"model\.weights is pretrained but model\.encoder is conv"):
        make_config("tiny", PRETRAINED)


def test_timm_downloads_its_own_weights(make_config: Any, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="no timm: pip install raymaml[timm]")
    network = timm.create_model("test_efficientnet", num_classes=7)
    path = saved(tmp_path / "timm.safetensors", network.state_dict())
    args = f"{{pretrained_cfg_overlay: {{file: {path}, num_classes: 7, first_conv: conv_stem}}}}"
    encoder = ("model.encoder=timm:test_efficientnet", f"model.encoder_args={args}")
    config = make_config("tiny", "model.width=null", *encoder, PRETRAINED)
    run = open_run(config, CPU)
    # timm adds up the three channels of the stem for gray images
    assert torch.allclose(
        run.learner.params["encoder.conv_stem.weight"], network.conv_stem.weight.sum(1, True)
    )
    assert torch.equal(run.learner.params["encoder.bn1.norm.bias"], network.bn1.bias)
    assert len(str(run.identity.weights_hash)) == 64

    gray = network.state_dict()
    gray["conv_stem.weight"] = gray["conv_stem.weight"].sum(1, keepdim=True)
    path = saved(tmp_path / "gray.pt", {"state_dict": gray, "args": {"lr": 1}})
    run = open_run(
        make_config("tiny", "model.width=null", encoder[0], f"model.weights={path}"), CPU
    )
    assert torch.equal(run.learner.params["encoder.bn1.norm.bias"], network.bn1.bias)
    assert "; left over classifier.weight, classifier.bias;" in run.start


def test_torchvision_downloads_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision").models
    network = models.shufflenet_v2_x0_5(weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    saved(cache / url.rpartition("/")[2], network.state_dict())
    encoder = raymaml.create_encoder(
        "torchvision:shufflenet_v2_x0_5", image_shape=(3, 32, 32), weights="pretrained"
    )
    assert torch.equal(encoder.conv5[0].weight, network.conv5[0].weight)
    assert torch.equal(encoder.conv5[1].running_var, network.conv5[1].running_var)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fails)
    monkeypatch.setattr("timm.models._builder.load_pretrained", fails)


MISTAKES = {
    "model.encoder=timm:test_resnte": "model.encoder: timm {timm} has no network test_resnte; near"
    " are test_resnet",
    "model.encoder=torchvision:resnet18": "model.encoder: torchvision:resnet18 takes images of 3"
    " channels, these have 1; import them in colour",
    "model.encoder=timm:hf-hub:a/b": "model.encoder is 'timm:hf-hub:a/b'; it must be one of",
    "model.encoder=timm:test_resnet model.encoder_args={pretrained: true}": "pretrained would be"
    " weights that the run does not know; give them as model.weights",
    "model.encoder=timm:test_resnet model.encoder_args={depth: 3}": "model.encoder:"
    " timm:test_resnet cannot be built with model.encoder_args {'depth': 3} (TypeError",
    "model.encoder=timm:test_resnet model.weights=pretrained": "model.weights: pretrained weights"
    " of timm:test_resnet cannot be had (OSError: no route to host); check the network, or bring",
    "model.weights=nowhere.pt": "model.weights: nowhere.pt cannot be read (No such file or"
    " directory); give a safetensors file, a torch state dict, or a run folder",
    "model.weights=nowhere://file": "model.weights is 'nowhere://file'; it should be a path, or a"
    " URI that fsspec knows (",
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("overrides", MISTAKES)
def test_by_the_command_a_mistake_is_one_message(
    make_config: Any, tmp_path: Path, overrides: str
) -> None:
    config = make_config()
    path, before = config.run_dir.parent / "config.yaml", sorted(tmp_path.rglob("*"))
    changes = [f"model.{each}" for each in overrides.removeprefix("model.").split(" model.")]
    outcome = CliRunner().invoke(
        main, ["train", "--local", str(path), "model.width=null", *changes]
    )
    assert outcome.exit_code == 2, outcome.output
    (line,) = outcome.output.splitlines()
    assert line.startswith("raymaml: ")
    version = importlib.import_module("timm").__version__
    assert MISTAKES[overrides].replace("{timm}", version) in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("encoder", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_without_a_network_pretrained_is_one_message(encoder: str) -> None:
    with pytest.raises(UserError) as caught:
        raymaml.create_encoder(encoder, image_shape=(3, 32, 32), weights="pretrained")
    assert caught.value.problems == (
        f"model.weights: pretrained weights of {encoder} cannot be had (OSError: no route to host);"
        " check the network, or bring the file here and name it in model.weights",
    )
