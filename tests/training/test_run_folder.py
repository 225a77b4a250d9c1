"""The run folder: one owner, one writer, one config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from raymaml.common.errors import StorageError, UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.training import run_folder
from raymaml.training.identity import IDENTITY
from raymaml.training.run import open_run
from raymaml.training.run_folder import (
    claim,
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


def test_a_claim_makes_the_folder_and_says_what_it_is(make_config: Any) -> None:
    config = make_config()
    folder = claimed(config)
    assert folder == config.run_folder
    identity = json.loads((folder / IDENTITY).read_text())
    assert identity["model"]["width"] == 4
    assert len(identity["bank_hash"]) == len(identity["train_manifest"]) == 64
    assert load_config(folder / "config.yaml") == config


def test_a_claim_alone_writes_nothing(make_config: Any) -> None:
    config = make_config()
    with claim(open_run(config, torch.device("cpu"))):
        assert [path.name for path in config.run_folder.iterdir()] == [".lock"]


def test_two_processes_cannot_write_one_run(make_config: Any) -> None:
    config = make_config()
    folder = claimed(config)
    with FileLock(folder / ".lock"):
        (problem,) = refused(config)
    assert problem.startswith(f"{folder}: another process is writing this run")
    assert claimed(config) == folder  # free again


def test_a_claim_ends_with_an_error_too(make_config: Any) -> None:
    config = make_config()
    run = open_run(config, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), claim(run):
        _ = 1 / 0
    claimed(config)


def test_a_changed_config_is_refused_with_both_values(make_config: Any) -> None:
    folder = claimed(make_config())
    before = (folder / "config.yaml").read_text(), (folder / IDENTITY).read_text()
    found = refused(make_config("tiny", "inner.lr=0.25", "outer.optimizer=sgd"))
    assert len(found) == 2
    assert f"{folder}: was started with inner.lr = 0.1, the config now says 0.25" in found[0]
    assert "outer.optimizer = 'adam', the config now says 'sgd'" in found[1]
    assert before == ((folder / "config.yaml").read_text(), (folder / IDENTITY).read_text())


def test_what_does_not_decide_the_weights_may_change(make_config: Any) -> None:
    folder = claimed(make_config())
    config = make_config("tiny", "outer.num_steps=9", "outer.log_every=2", "cluster.num_workers=2")
    assert claimed(config) == folder
    assert load_config(folder / "config.yaml") == config


def test_a_schedule_does_not_allow_another_number_of_steps(make_config: Any) -> None:
    claimed(make_config("tiny", "outer.schedule=cosine"))
    (problem,) = refused(make_config("tiny", "outer.schedule=cosine", "outer.num_steps=9"))
    assert "outer.num_steps = 6, the config now says 9" in problem


def test_other_training_episodes_are_another_run(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    folder = claimed(config)
    path = folder / IDENTITY
    identity = json.loads(path.read_text())
    path.write_text(json.dumps(identity | {"bank_hash": "0" * 64}))
    (problem,) = refused(config)
    assert "bank_hash = '000" in problem
    assert identity["bank_hash"] in problem


def test_a_run_from_before_episodes_had_a_seed_was_of_its_seed(make_config: Any) -> None:
    config = make_config()  # seed 3, episodes.seed 3
    path = claimed(config) / IDENTITY
    identity = json.loads(path.read_text())
    del identity["episodes"]["seed"]
    path.write_text(json.dumps(identity))
    claimed(config)
    (problem,) = refused(make_config("tiny", "seed=4"))  # the episodes stay those of 3
    assert "was started with seed = 3, the config now says 4" in problem


def test_a_run_dir_that_is_a_file_is_refused(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (problem,) = refused(make_config("tiny", f"run_dir={tmp_path / 'file'}"))
    assert problem.startswith(f"run_dir: {tmp_path / 'file' / 'tiny'} cannot be made a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stop_is_asked_for_once(make_config: Any) -> None:
    config = make_config()
    folder = claimed(config)
    assert not stop_requested(folder)
    request_stop(folder)
    assert stop_requested(folder)
    claimed(config)  # a new start forgets it
    assert not stop_requested(folder)


def test_the_writer_sweeps_up_what_a_kill_left(tmp_path: Path) -> None:
    for name in (".checkpoint_00000002.partial-12ab", ".checkpoint_00000001.partial-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.pt").write_text("half")
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
        patched.setattr(run_folder, "exists", away)
        assert not asked()
    assert asked()
