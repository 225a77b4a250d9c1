"""Settings and checkpoints of the reference, as it writes them, in our words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers_reference import BLOCKS, TEST, TRAIN, saved

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.convert import from_reference, reference_names
from raymaml.training.checkpoint import find_checkpoint, weights_of


def changed(config: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A copy with ``a__b=value`` for config["a"]["b"]; None removes the key."""
    result = copy.deepcopy(config)
    for key, value in keys.items():
        *path, last = key.split("__")
        section = result
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        if value is None:
            del section[last]
    return result


def write(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def checkpoint(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    tree, path = saved(), folder / "max-va.pth"
    change(tree)
    torch.save(tree, path)
    return path


def convert(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def converted(folder: Path, *trees: dict[str, Any]) -> tuple[Config, str]:
    """Our config for configurations of the reference, and the lines of the command."""
    paths = [write(folder, f"theirs-{number}.yaml", tree) for number, tree in enumerate(trees)]
    outcome = convert(*paths, "--out", folder / "ours.yaml")
    assert outcome.exit_code == 0, outcome.output
    return load_config(folder / "ours.yaml"), outcome.output


def test_a_training_and_a_test_configuration_become_one_of_ours(tmp_path: Path) -> None:
    config, _ = converted(tmp_path, TRAIN, TEST)
    assert config.name == "convnet4-mini-imagenet-5way-1shot"
    assert (config.model.encoder, config.model.stage_widths[0]) == ("convnet4", 32)
    assert (config.model.norm, config.model.head) == ("episodic_biased", "zero")
    inner = config.inner
    assert (inner.num_steps, inner.lr, inner.head_lr) == (5, 0.01, 0.02)
    assert (inner.momentum, inner.weight_decay, inner.gradient) == (0.9, 5e-4, "unrolled")
    judged = config.test_inner
    assert (judged.num_steps, judged.head_lr, judged.weight_decay) == (10, 0.01, 0.0)
    outer = config.outer
    assert (outer.num_steps, outer.meta_batch_size, outer.validate_every) == (30_000, 4, 200)
    assert (outer.optimizer, outer.lr, outer.momentum) == ("sgd", 0.01, 0.9)
    assert (outer.schedule, outer.milestones, outer.gamma) == ("step", (24_000, 28_000), 0.1)
    assert (outer.weight_decay, outer.clip_value) == (5e-4, 10)
    counts = [config.episodes.of(split).num_episodes for split in ("train", "val", "test")]
    assert counts == [120_000, 800, 8000]  # 150 x 200 x 4; the same 200 x 4; 10 x 200 x 4
    assert config.episodes.test.num_queries == 1
    assert config.data.image_size == 84


NORMS = [
    ({"track_running_stats": False}, "transductive"),
    ({}, "running"),
    ({"episodic": ["conv3"]}, {"encoder.conv3": "episodic_biased", "*": "running"}),
    ({"episodic": BLOCKS, "alpha": True}, "tasknorm_reference"),
]
ENCODERS = [
    ("wide-convnet4", "convnet4", (64, 64, 64, 64)),
    ("resnet12", "resnet12", (64, 128, 256, 512)),
    ("wide-resnet12", "resnet12", (64, 160, 320, 640)),
    ("resnet18", "resnet10", (64, 128, 256, 512)),
]
FROZEN = [
    (["bn"], ("*.norm",)),
    (["encoder"], ("encoder",)),
    (["classifier"], ("head",)),
    (["conv1", "linear.bias"], ("encoder.conv1", "head.bias")),
]
SMALL = {"encoder_args": {"bn_args": {}}, "train__image_size": 16, "val__image_size": 16}
CONVERTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        (
            {"encoder_args__bn_args": {**bn, "momentum": 0.2, "eps": 1e-3}},
            {"model.norm": norm, "model.norm_momentum": 0.2, "model.norm_eps": 1e-3},
        )
        for bn, norm in NORMS
    ),
    *(
        ({**SMALL, "encoder": theirs}, {"model.encoder": ours, "model.stage_widths": widths})
        for theirs, ours, widths in ENCODERS
    ),
    *(({"inner_args__frozen": texts}, {"inner.frozen": patterns}) for texts, patterns in FROZEN),
    ({"dataset": "meta-inatural"}, {"data.source.path": Path("materials/inatural")}),
]


@pytest.mark.parametrize(("change", "wanted"), CONVERTED)
def test_each_setting_has_its_counterpart(
    change: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    config, _ = converted(tmp_path, changed(TRAIN, **change))
    assert {key: reduce(getattr, key.split("."), config) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("encoder", "ours", "theirs"),
    [
        ("convnet4", "encoder.conv3.norm.bias", "encoder.encoder.conv3.bn.bias"),
        ("resnet12", "encoder.layer2.conv3.norm.bias", "encoder.layer2.bn3.bias"),
        ("resnet12", "encoder.layer1.shortcut.conv.weight", "encoder.layer1.res_conv.conv.weight"),
        ("resnet18", "encoder.stem.norm.weight", "encoder.layer0.bn.weight"),
        ("resnet18", "encoder.layer2.0.conv1.conv.weight", "encoder.layer2.conv1.weight"),
        ("resnet18", "head.bias", "classifier.linear.bias"),
    ],
)
def test_each_parameter_has_a_name_in_the_reference(encoder: str, ours: str, theirs: str) -> None:
    names = reference_names(from_reference(changed(TRAIN, **SMALL, encoder=encoder), None))
    assert names[ours] == theirs
    assert len(set(names.values())) == len(names)


def test_notes_say_where_the_reference_deviates_from_its_own_settings(tmp_path: Path) -> None:
    config = changed(TRAIN, inner_args__n_step=0, inner_args__encoder_lr=0, dataset="meta-cub200")
    config["inner_args"]["frozen"] = ["bn", "nothing"]
    ours, output = converted(tmp_path, config)
    assert (ours.inner.num_steps, ours.inner.lr, ours.inner.frozen) == (5, 0.01, ("*.norm",))
    zeros = ("n_step: 0 stands for 5", "encoder_lr: 0 stands for 0.01")
    for text in (*zeros, "'nothing' is in no", "check the name"):
        assert text in output
        assert text in (tmp_path / "ours.yaml").read_text(encoding="utf-8")


def test_a_checkpoint_becomes_a_run_that_can_be_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, out = checkpoint(tmp_path), tmp_path / "ours.yaml"
    test = write(tmp_path, "test.yaml", TEST)
    outcome = convert(test, "--checkpoint", path, "--out", out)
    assert outcome.exit_code == 0, outcome.output
    config = load_config(out)
    found = find_checkpoint(config.run_folder, "best")
    params = weights_of(found, torch.device("cpu"))
    learner = from_reference(TEST, path)
    assert learner.inner.num_steps == 10
    assert set(params) == {*learner.params}
    for name, value in learner.params.items():
        assert torch.equal(params[name], value)
    saved = torch.load(path, weights_only=True)
    wanted = saved["encoder_state_dict"]["encoder.conv3.bn.weight"]
    assert torch.equal(params["encoder.conv3.norm.weight"], wanted)
    again = convert(test, "--checkpoint", path, "--out", tmp_path / "other.yaml")
    assert again.exit_code == 2
    assert "holds checkpoints; give another --name" in again.output
    assert not (tmp_path / "other.yaml").exists()


BN = "encoder_args.bn_args"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "mini-imagenet"}, "dataset is 'mini-imagenet'; it should be 'meta-mini-imagenet'"),
    ({"encoder": "resnet50"}, "encoder is 'resnet50'; it should be 'convnet4', 'wide-convnet4'"),
    ({"inner_args__nstep": 3}, "inner_args.nstep is unknown; did you mean n_step?"),
    ({"val__image_size": 80}, "image_size: the sections say 80, 84"),
    ({"train__split": "train"}, "train.split: 'train' is not 'meta-train'"),
    ({"encoder_args__bn_args__affine": False}, f"{BN}.affine is false; it should be True"),
    ({"encoder_args__bn_args__episodic": ["layer1"]}, "the encoder has no layer1"),
    ({"encoder_args__bn_args": {"alpha": True}}, "alpha: has no counterpart without episodic"),
    ({"optimizer_args__schedule": "cosine"}, "cosine ends after 140 epochs of 150"),
    ({"epoch": None}, "train.yaml: epoch is missing"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_has_no_counterpart_is_refused_with_the_reason(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    out = tmp_path / "ours.yaml"
    outcome = convert(write(tmp_path, "train.yaml", changed(TRAIN, **change)), "--out", out)
    assert outcome.exit_code == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert says in outcome.output
    assert not out.exists()


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    test, out = write(tmp_path, "test.yaml", TEST), tmp_path / "ours.yaml"
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    torch.save({"encoder": "convnet4"}, tmp_path / "half.pth")
    cases = [
        ([], "no file is given; give the training configuration"),
        ([test], "names no model"),
        ([test, test], "hold more than one testing configuration"),
        ([test, "--checkpoint", tmp_path / "bad.pth"], "bad.pth"),
        ([test, "--checkpoint", tmp_path / "half.pth"], "lacks classifier"),
        ([test, "--checkpoint", tmp_path / "none.pth"], "none.pth"),
    ]
    for arguments, says in cases:
        outcome = convert(*arguments, "--out", out)
        assert outcome.exit_code == 2, (arguments, outcome.output, outcome.exception)
        assert "Traceback" not in outcome.output
        assert says in outcome.output


def test_tensors_of_another_shape_and_missing_ones_are_all_named(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        del tree["encoder_state_dict"]["encoder.conv1.conv.bias"]
        tree["encoder_state_dict"]["encoder.conv2.bn.bias"] = torch.zeros(7)

    with pytest.raises(UserError) as caught:
        from_reference(TRAIN, checkpoint(tmp_path, change))
    first, second = caught.value.problems
    assert "no encoder.encoder.conv1.conv.bias" in first
    assert (
        "encoder.encoder.conv2.bn.bias has shape [7], ours (encoder.conv2.norm.bias) [32]" in second
    )


def test_a_test_configuration_needs_a_checkpoint_whose_settings_are_plain_values(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="names no model; give the checkpoint as well"):
        from_reference(TEST, None)
    path = checkpoint(tmp_path, lambda tree: tree["encoder_args"].update(bn_args=torch.zeros(3)))
    with pytest.raises(UserError, match=r"max-va\.pth: encoder_args\.dict\.bn_args"):
        from_reference(TEST, path)


def test_mistakes_of_both_files_come_at_once_with_their_lines(tmp_path: Path) -> None:
    train = write(tmp_path, "a.yaml", changed(TRAIN, optimizer="adamax", encoder="vgg"))
    test = write(tmp_path, "b.yaml", changed(TEST, epoch=None))
    outcome = convert(train, test, "--out", tmp_path / "o")
    assert outcome.exit_code == 2
    lines = {line.split(":")[0]: n for n, line in enumerate(train.read_text().splitlines(), 1)}
    for says in (
        f"a.yaml:{lines['encoder']}: encoder is 'vgg'",
        f"a.yaml:{lines['optimizer']}: optimizer is 'adamax'",
        "b.yaml: epoch is missing",
    ):
        assert says in outcome.output
    assert not (tmp_path / "o").exists()
