"""What a checkpoint says is compared with its folder, its run and the config before it is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import quiet

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.evaluation.run_audit import audit_run
from raymaml.evaluation.run_test import plan_test
from raymaml.training.checkpoint import checkpoint_path, find_checkpoint, read_card
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")
Reader = Callable[[Config], Any]
VALIDATED = "outer.validate_every=6"
OTHER = {"seed": "4", "inner.lr": "0.2", "model.norm": "context"}


def longer(config: Config, steps: int = 9) -> Config:
    outer = config.outer.model_copy(update={"num_steps": steps})
    return config.model_copy(update={"outer": outer})


READERS: dict[str, Reader] = {
    "train": lambda config: train_locally(longer(config), quiet),
    "train, with nothing left to do": lambda config: train_locally(config, quiet),
    "test": lambda config: plan_test(config, CPU),
    "audit": lambda config: audit_run(config, quiet),
    "load_learner": raymaml.load_learner,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two finished runs, once a test has made them."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(make_config: Any, finished: Path, tmp_path: Path) -> Config:
    """A run whose last checkpoint, at step 6, is its best."""
    for name, changes in (("tiny", {}), ("other", OTHER)):
        if not (finished / name).exists():
            overrides = [f"{key}={value}" for key, value in changes.items()]
            assert train_locally(make_config(finished / name, VALIDATED, *overrides), quiet)
        shutil.copytree(finished / name, tmp_path / name)
    config: Config = make_config("tiny", VALIDATED)
    best(config, 6)
    return config


def best(config: Config, step: int) -> None:
    """Have the checkpoint of a step be the best: accuracies of 4 episodes are as they come."""
    first, last = (checkpoint_path(config.run_folder, each) for each in (0, 6))
    cards = {path: card_of(path) for path in (first, last) if path.exists()}
    validation = cards[last]["validation"] | {"accuracy": 1.0 if step == 6 else 0.0}
    chosen = validation if step == 6 else cards[first]["validation"]
    write_card(last, cards[last] | {"validation": validation, "best": chosen})
    measured(config, 6, validation["accuracy"])


def measured(config: Config, step: int, accuracy: float) -> None:
    """Have ``metrics.jsonl`` say that a validation gave this accuracy."""
    metrics = config.run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if row["step"] == step and "val_accuracy" in row:
            row["val_accuracy"] = accuracy
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def card_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
    return found


def write_card(path: Path, card: dict[str, Any]) -> None:
    (path / "checkpoint.json").write_text(json.dumps(card))


def refused(reader: Reader, config: Config) -> str:
    with pytest.raises(UserError) as caught:
        reader(config)
    return str(caught.value)


SAYS = {
    # about itself
    "step": (5, "step is 5, the folder's name says 6"),
    "validation.step": (7, "validation.step is 7, step is 6"),
    "best.step": (7, "best.step is 7, validation.step is 6"),
    "best.accuracy": (0.5, "best.accuracy is 0.5, validation.accuracy is 1.0"),
    "best.loss": (99.0, "best and validation differ, both of step 6"),
    "best": (None, "best is absent, validation is of step 6"),
    # about its run
    "config.seed": (99, "seed is 99, {whose} 3"),
    "config.inner.lr": (0.7, "inner.lr is 0.7, {whose} 0.1"),
    "config.outer.lr": (0.5, "outer.lr is 0.5, {whose} 0.001"),
    "config.model.temperature": (2.0, "model.temperature is 2.0, {whose} 1.0"),
    "bank_hash": ("d" * 64, "bank_hash is 'dddddddd"),
    " bank_hash": ("", "bank_hash is '', "),  # as converted weights have it
}


@pytest.mark.parametrize("key", SAYS)
def test_a_card_that_says_something_else_is_refused(run: Config, key: str) -> None:
    value, says = SAYS[key]
    path = checkpoint_path(run.run_folder, 6)
    card = tree = card_of(path)
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree[section]
    tree[last] = value
    write_card(path, card)
    for name, reader in READERS.items():
        text = refused(reader, run)
        whose = "the config and its bank say" if name.startswith("train") else "run.json says"
        assert f"{path / 'checkpoint.json'}: {says.format(whose=whose)}" in text
        assert "restore it from a copy" in text


def by_newest(config: Config) -> Config:
    evaluation = config.evaluation.model_copy(update={"checkpoint": "last"})
    return config.model_copy(update={"evaluation": evaluation})


def checkpoint_of_other(config: Config, step: int) -> Path:
    """Put the checkpoint of the other run in the place of the run's own."""
    path = checkpoint_path(config.run_folder, step)
    shutil.rmtree(path)
    other = config.run_dir.parent.parent / "other/runs/tiny"
    shutil.copytree(checkpoint_path(other, step), path)
    return path


def test_another_image_shape_is_refused(run: Config) -> None:
    path = checkpoint_path(run.run_folder, 6)
    write_card(path, card_of(path) | {"image_shape": [3, 16, 16]})
    for reader in READERS.values():
        assert "image" in refused(reader, run)


def test_a_whole_checkpoint_folder_of_another_run_is_refused(run: Config) -> None:
    path = checkpoint_of_other(run, 6)
    for reader in READERS.values():
        text = refused(reader, by_newest(run)).replace("'", "")
        for key, value in OTHER.items():
            assert f"{path / 'checkpoint.json'}: {key} is {value}, " in text


def test_a_checkpoint_of_the_same_run_under_another_step_is_refused(run: Config) -> None:
    """Weights and optimizer of step 6 would go on as those of step 8."""
    folder = run.run_folder
    checkpoint_path(folder, 6).rename(checkpoint_path(folder, 8))
    for reader in READERS.values():
        assert "step is 6, the folder's name says 8" in refused(reader, run)


def test_a_best_checkpoint_that_is_of_another_run_or_not_there_is_refused(run: Config) -> None:
    best(run, 0)
    path = checkpoint_of_other(run, 0)
    for reader in READERS.values():
        assert str(path) in refused(reader, run)
    shutil.rmtree(path)
    for reader in READERS.values():
        text = refused(reader, run)
        assert f"best.step is 0, but {path} is not there; restore it from a copy" in text


def test_a_run_folder_without_run_json_is_compared_with_the_config(run: Config) -> None:
    (run.run_folder / "run.json").unlink()
    inner = run.inner.model_copy(update={"lr": 0.7})
    text = refused(READERS["train"], run.model_copy(update={"inner": inner}))
    assert "inner.lr is 0.1, the config and its bank say 0.7" in text


def test_what_may_change_may_change(run: Config, make_config: Any) -> None:
    free = ["outer.validate_every=2", "outer.log_every=5", "cluster.timeout=30"]
    same = "evaluation.inner={num_steps: 2, lr: 0.1}"  # as in training
    later = make_config("tiny", *free, same, "outer.num_steps=8")
    assert train_locally(later, quiet)
    assert read_card(find_checkpoint(later.run_folder, "last")).step == 8
    assert plan_test(later, CPU).arms
    assert raymaml.load_learner(later) is not None


def test_a_run_goes_on_by_its_validation_alone(
    run: Config, make_config: Any, tmp_path: Path
) -> None:
    """`best` would compare accuracies of two protocols."""
    later = make_config(
        "tiny",
        *(VALIDATED, "outer.num_steps=9", f"data.shards={tmp_path / 'other-shards'}"),
        *("evaluation.inner={num_steps: 0, lr: 0.5}", "data.augment.val={query: flip}"),
        *("episodes.val.num_episodes=3", "episodes.val.num_shots=2"),
    )
    text = refused(READERS["train"], later)
    card = checkpoint_path(run.run_folder, 6) / "checkpoint.json"
    for says in (
        "evaluation.inner.num_steps = 2, the config now says 0",
        "evaluation.inner.lr = 0.1, the config now says 0.5",
        "episodes.val.num_episodes = 4, the config now says 3",
        "episodes.val.num_shots = 1, the config now says 2",
        "data.augment.val.query = 'none', the config now says 'flip'",
    ):
        assert f"{card}: was validated with {says}" in text
    assert "give the new one to `raymaml test` alone" in text


def test_a_finished_run_may_be_tested_otherwise(run: Config, make_config: Any) -> None:
    later = make_config("tiny", VALIDATED, "evaluation.inner={num_steps: 0}")
    assert train_locally(later, quiet)  # nothing is left to do
    assert plan_test(later, CPU).arms


def test_converted_weights_are_of_no_bank_until_a_run_goes_on_from_them(run: Config) -> None:
    path = checkpoint_path(run.run_folder, 6)
    card = card_of(path) | {"bank_hash": "", "validation": None, "best": None}
    for place in run.run_folder.iterdir():
        if place != path:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    write_card(path, card)
    for name, reader in READERS.items():
        if not name.startswith("train"):
            reader(run)
    assert read_card(path).bank_hash == ""
    assert train_locally(longer(run, 7), quiet)
    first, last = (read_card(find_checkpoint(run.run_folder, which)) for which in ("best", "last"))
    assert (first.step, last.step) == (6, 7)  # the only validation is of the converted weights
    assert first.bank_hash == last.bank_hash != ""
    assert train_locally(longer(run, 8), quiet)
    assert plan_test(longer(run, 8), CPU).arms
    for step in (6, 8):
        path = checkpoint_path(run.run_folder, step)
        write_card(path, card_of(path) | {"bank_hash": ""})
        assert "bank_hash is ''" in refused(READERS["train"], run)
        write_card(path, card_of(path) | {"bank_hash": first.bank_hash})


def test_the_schema_of_a_card_hides_no_edited_encoder(run: Config) -> None:
    path = checkpoint_path(run.run_folder, 6)
    place = run.run_folder / "run.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"encoder_source": "a" * 64}))
    write_card(path, card_of(path) | {"schema_version": 1, "encoder_source": "b" * 64})
    for name in ("test", "audit", "load_learner"):
        assert "encoder_source is 'bbbb" in refused(READERS[name], run)


@pytest.mark.parametrize("step", [0, 6])
def test_an_accuracy_that_was_not_measured_is_refused(run: Config, step: int) -> None:
    """A best accuracy of 1 would make every later validation the worse one."""
    best(run, step)
    card = checkpoint_path(run.run_folder, 6)
    expected = card_of(card)["best"]["accuracy"]
    assert expected != 0.25  # else this test tests nothing
    measured(run, step, 0.25)
    for reader in READERS.values():
        text = refused(reader, by_newest(run))
        says = f"best.accuracy is {expected}, metrics.jsonl says 0.25 of step {step}"
        assert f"{card / 'checkpoint.json'}: {says}" in text


@pytest.mark.parametrize("without", [(), ("run.json",)])
def test_a_run_of_another_order_of_images_is_tested_and_not_trained(
    run: Config, without: tuple[str, ...]
) -> None:
    """As the first schema left it: no source, other episodes, all files of version 1."""
    for path in run.run_folder.glob("checkpoint_*"):
        card = card_of(path)
        del card["encoder_source"]
        write_card(path, card | {"schema_version": 1, "inherited_from": None})
    place = run.run_folder / "run.json"
    tree = json.loads(place.read_text())
    for key in ("schema_version", "encoder_source", "classes"):
        del tree[key]
    tree["data"]["augment"] = tree["data"]["augment"]["train"]
    place.write_text(json.dumps(tree | {"train_manifest": "e" * 64}))
    for name in without:
        (run.run_folder / name).unlink()
    for name in list(READERS)[:2]:
        assert refused(READERS[name], run) == (
            f"{run.run_folder}: was started by an earlier raymaml, whose images stood in another"
            " order; choose another name, or finish it with that version; `raymaml test` judges"
            " what it has"
        )
    assert plan_test(run, CPU).arms
