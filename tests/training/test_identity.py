"""Run folders of earlier versions: a key that did not exist then stands for its default of then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.training.identity import (
    ABSENT,
    IDENTITY,
    SCHEMA_VERSION,
    as_meant,
    deciding,
    differences,
)
from raymaml.training.run import open_run
from raymaml.training.run_folder import claim, write_identity


@pytest.fixture
def config(make_config: Any) -> Config:
    found: Config = make_config()
    begun(found)
    return found


def begun(config: Config) -> None:
    run = open_run(config, torch.device("cpu"))
    with claim(run):
        write_identity(run)


def identity(config: Config) -> Path:
    place = config.run_folder / IDENTITY
    assert isinstance(place, Path)
    return place


def change(config: Config, **sections: Any) -> None:
    tree = json.loads(identity(config).read_text())
    identity(config).write_text(json.dumps(tree | sections))


def without(config: Config, section: str, key: str) -> None:
    tree = json.loads(identity(config).read_text())
    del tree[section][key]
    identity(config).write_text(json.dumps(tree))


def test_a_run_says_its_schema_version(config: Config) -> None:
    assert json.loads(identity(config).read_text())["schema_version"] == SCHEMA_VERSION == 2


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("model", "temperature"),
        ("model", "norm"),
        ("model", "encoder_args"),
        ("inner", "frozen"),
        ("inner", "head_lr"),
        ("outer", "clip_norm"),
        ("cluster", "precision"),
    ],
)
def test_a_run_that_does_not_know_a_key_goes_on_with_its_default(
    config: Config, section: str, key: str
) -> None:
    without(config, section, key)
    begun(config)


def test_a_key_that_a_run_does_not_know_is_compared_by_its_default(
    config: Config, make_config: Any
) -> None:
    without(config, "model", "temperature")
    with pytest.raises(UserError, match=r"with model.temperature = 1.0, the config now says 2.0;"):
        begun(make_config("tiny", "model.temperature=2"))


def test_a_run_of_a_later_schema_names_the_remedy(config: Config) -> None:
    change(config, schema_version=3)
    with pytest.raises(UserError, match=r"has schema_version 3, .* use the raymaml that wrote it"):
        begun(config)


def test_a_key_that_this_version_does_not_know_is_named(config: Config) -> None:
    change(config, cluster={**json.loads(identity(config).read_text())["cluster"], "magic": 7})
    with pytest.raises(UserError, match=r"cluster.magic = 7, the config now says 'absent'"):
        begun(config)


@pytest.mark.parametrize("content", ['{"data": 3}', "[]", '{"schema_version": "x"}', "{"])
def test_what_is_no_identity_is_refused(config: Config, content: str) -> None:
    identity(config).write_text(content)
    with pytest.raises(UserError, match=r"run\.json: (is damaged|has schema)|an earlier raymaml"):
        begun(config)


def test_patterns_and_arguments_are_values(make_config: Any) -> None:
    config = make_config("tiny", "model.norm={encoder.conv1: none, '*': context}")
    norm = deciding(config)["model.norm"]
    assert norm == {"encoder.conv1": "none", "*": "context"}
    assert differences({"model.norm": "running"}, {"model.norm": norm}) == {
        "model.norm": ("running", norm)
    }


def test_what_has_no_default_is_absent() -> None:
    assert differences({}, {"outer.num_steps": 3, "bank_hash": "x"}) == {
        "outer.num_steps": (ABSENT, 3),
        "bank_hash": (ABSENT, "x"),
    }
    assert differences({}, {"model.temperature": 1.0, "inner.frozen": []}) == {}


def test_nothing_is_added_to_what_is_of_today(config: Config) -> None:
    tree = config.model_dump(mode="json")
    assert as_meant(tree) == tree
