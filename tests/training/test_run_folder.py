"""The run folder: one owner, one writer, one config; ``run.json`` of this and earlier versions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymaml.common.errors import StorageError, UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.training import run as run_module
from raymaml.training.identity import ABSENT, IDENTITY, as_meant, differences, flat
from raymaml.training.run import (
    claim,
    open_run,
    request_stop,
    sole_writer,
    stop_requested,
    watch_stop,
    write_identity,
)


def claimed(config: Config) -> Path:
    run = open_run(config, torch.device("cpu"))
    with claim(run):
        write_identity(run)
    return run.folder


def refused(config: Config) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        claimed(config)
    return caught.value.problems


@pytest.fixture
def config(make_config: Any) -> Config:
    """The config of a run that was claimed."""
    found: Config = make_config()
    claimed(found)
    return found


def identity(config: Config, *without: str, **changes: Any) -> dict[str, Any]:
    """Return the content of ``run.json``, having changed keys and left some out."""
    path = config.run_folder / IDENTITY
    tree: dict[str, Any] = json.loads(path.read_text()) | changes
    for key in without:
        section, _, last = key.partition(".")
        del tree[section][last]
    path.write_text(json.dumps(tree))
    return tree


def test_a_claim_makes_the_folder_and_the_writer_says_what_it_is(make_config: Any) -> None:
    config = make_config()
    with contextlib.suppress(ZeroDivisionError), claim(open_run(config, torch.device("cpu"))):
        assert [path.name for path in config.run_folder.iterdir()] == [".lock"]
        _ = 1 / 0
    assert claimed(config) == config.run_folder  # free again
    found = identity(config)
    assert (found["schema_version"], found["model"]["width"]) == (3, 4)
    assert len(found["bank_hash"]) == len(found["train_manifest"]) == 64
    assert load_config(config.run_folder / "config.yaml") == config


def test_what_does_not_decide_the_weights_may_change(config: Config, make_config: Any) -> None:
    other = make_config("tiny", "outer.num_steps=9", "outer.log_every=2", "cluster.num_workers=2")
    assert load_config(claimed(other) / "config.yaml") == other


def test_other_training_episodes_are_another_run(config: Config) -> None:
    bank = identity(config)["bank_hash"]
    identity(config, bank_hash="0" * 64)
    (problem,) = refused(config)
    assert "bank_hash = '000" in problem
    assert bank in problem


def test_a_run_from_before_episodes_had_a_seed_was_of_its_seed(
    config: Config, make_config: Any
) -> None:
    identity(config, "episodes.seed")  # seed 3, episodes.seed 3
    claimed(config)
    (problem,) = refused(make_config("tiny", "seed=4"))  # the episodes stay those of 3
    assert "was started with seed = 3, the config now says 4" in problem


def test_a_key_that_a_run_does_not_know_stands_for_its_default(
    config: Config, make_config: Any
) -> None:
    keys = ("temperature", "norm", "encoder_args")
    more = ("inner.frozen", "inner.head_lr", "outer.clip_norm", "cluster.precision")
    identity(config, *(f"model.{key}" for key in keys), *more)
    claimed(config)
    (problem,) = refused(make_config("tiny", "model.temperature=2"))
    assert "with model.temperature = 1.0, the config now says 2.0;" in problem
    assert differences({}, {"model.temperature": 1.0, "inner.frozen": []}) == {}
    assert differences({}, {"outer.num_steps": 3, "bank_hash": "x"}) == {
        "outer.num_steps": (ABSENT, 3),
        "bank_hash": (ABSENT, "x"),
    }
    tree = config.model_dump(mode="json")
    assert as_meant(tree) == tree  # nothing is added to a config of today


def test_a_key_that_this_version_does_not_know_is_named(config: Config) -> None:
    identity(config, cluster={**identity(config)["cluster"], "magic": 7})
    (problem,) = refused(config)
    assert "cluster.magic = 7, the config now says 'absent'" in problem


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"schema_version": 4}', "has schema_version 4, this raymaml reads 1 to 3; use the ray"),
        ('{"schema_version": "x"}', "has schema_version 'x'"),
        ('{"data": 3}', "was started by an earlier raymaml"),
        ("[]", "run.json: is damaged; restore it"),
        ("{", "run.json: is damaged; restore it"),
    ],
)
def test_what_is_no_identity_is_refused(config: Config, content: str, says: str) -> None:
    (config.run_folder / IDENTITY).write_text(content)
    (problem,) = refused(config)
    assert says in problem


def test_patterns_and_arguments_are_values(make_config: Any) -> None:
    config = make_config("tiny", "model.norm={encoder.conv1: none, '*': context}")
    norm = flat(config.learning)["model.norm"]
    assert norm == {"encoder.conv1": "none", "*": "context"}
    assert differences({"model.norm": "running"}, {"model.norm": norm}) == {
        "model.norm": ("running", norm)
    }


def test_numbers_of_a_rule_and_stages_of_a_loss_are_values(make_config: Any) -> None:
    plain = flat(make_config("tiny").learning)
    several = {"num_outer_steps": 20, "num_stages": 10}
    config = make_config("tiny", f"inner.multi_step_loss={several}")
    assert differences(plain, flat(config.learning)) == {"inner.multi_step_loss": (None, several)}
    config = make_config("tiny", "inner.rule=rmsprop", "inner.rule_args.beta=0.5")
    found = differences(plain, flat(config.learning))
    assert found["inner.rule_args"] == ({}, {"beta": 0.5})
    assert found.keys() == {"inner.rule", "inner.rule_args"}


def test_a_stop_is_asked_for_once(config: Config) -> None:
    folder = config.run_folder
    assert not stop_requested(folder)
    request_stop(folder)
    assert stop_requested(folder)
    claimed(config)  # a new start forgets it
    assert not stop_requested(folder)


def test_the_writer_sweeps_up_what_a_kill_left(tmp_path: Path) -> None:
    for name in (".checkpoint_00000002.partial-12ab", ".checkpoint_00000001.partial-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.safetensors").write_text("half")
    (tmp_path / ".metrics.jsonl.partial-12ab").write_text("half")
    (tmp_path / "checkpoint_00000001").mkdir()
    (tmp_path / ".mine").mkdir()
    with sole_writer(tmp_path):
        kept = {path.name for path in tmp_path.iterdir()} - {".writer"}
    assert kept == {"checkpoint_00000001", ".mine"}


def test_a_storage_that_is_away_for_a_moment_asks_for_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_place: Path) -> bool:
        raise StorageError("away")

    asked = watch_stop(tmp_path)
    request_stop(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "exists", away)
        assert not asked()
    assert asked()
