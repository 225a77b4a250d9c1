"""Data that change under a run: at its start, and while they are mapped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers_faults import bits, quiet

from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank
from raymaml.data.shards import EpisodeShards
from raymaml.data.watch import Watch
from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_test import plan_test
from raymaml.training.checkpoint import list_steps
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")


@pytest.fixture
def config(make_config, tiny_bank, tmp_path):
    """A config with a bank of its own, to be altered."""
    shutil.copytree(tiny_bank.folder, tmp_path / "bank")
    return make_config("run", f"data.bank={tmp_path / 'bank'}")


def flip(path: Path, at: float = 0.5) -> bytes:
    """Change a byte in place, keeping the size; return the content as it was."""
    before = path.read_bytes()
    where = int(at * len(before))
    with path.open("r+b") as file:
        file.seek(where)
        file.write(bytes([before[where] ^ 255]))
    return before


def shard_of(config) -> Path:
    return config.data.shards / "train" / "shard-00000.arrow"


@pytest.mark.fault("bank altered")
def test_a_bank_that_was_altered_is_not_learned_from(config):
    path = config.data.bank / "images.arrow"
    flip(path)
    ImageBank.open(config.data.bank)  # sizes are as they should be
    with pytest.raises(UserError, match=r"images\.arrow: is altered") as caught:
        train_locally(config, quiet)
    assert "import it again" in str(caught.value)
    assert list_steps(config.run_folder) == []


@pytest.mark.fault("shard corrupted: at the start")
def test_a_shard_that_was_altered_is_not_learned_from(config):
    flip(shard_of(config))
    with pytest.raises(UserError, match=r"shard-00000\.arrow: is altered") as caught:
        train_locally(config, quiet)
    assert "sample again" in str(caught.value)
    assert not config.run_folder.exists()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        pytest.param(
            "shard",
            r"shard-00000\.arrow: is altered",
            marks=pytest.mark.fault("shard corrupted: while training"),
        ),
        pytest.param("bank", r"images\.arrow: is altered", marks=pytest.mark.fault("bank altered")),
    ],
)
def test_data_altered_during_training_are_never_kept(config, make_config, which, message):
    lone = make_config("run", "name=lone", f"data.bank={config.data.bank}")
    assert train_locally(lone, quiet)
    path = shard_of(config) if which == "shard" else config.data.bank / "images.arrow"
    before: list[bytes] = []

    def alter(line: str) -> None:
        if line.startswith("step 1/"):
            before.append(flip(path))

    with pytest.raises(UserError, match=message):
        train_locally(config, alter)
    assert list_steps(config.run_folder) == [0]  # that before step 3 was not written

    path.write_bytes(before[0])
    assert train_locally(config, quiet)
    assert bits(config.run_folder) == bits(lone.run_folder)


@pytest.mark.fault("bank altered")
def test_records_of_an_altered_bank_are_never_kept(config):
    assert train_locally(config, quiet)
    campaign = plan_test(config, CPU)
    path = config.data.bank / "images.arrow"
    before = flip(path)
    with pytest.raises(UserError, match=r"images\.arrow: is altered"):
        judge_locally(lambda _device: campaign, config.cluster, quiet)
    path.write_bytes(before)
    campaign = plan_test(config, CPU)
    first, second = campaign.missing()[:2]
    assert len(campaign.judge(first)) == first.count
    flip(config.data.bank / "images.arrow")
    with pytest.raises(UserError, match=r"images\.arrow: is altered"):
        campaign.judge(second)
    assert len(list(config.run_folder.glob("test/*/*/*.parquet"))) == 1


def test_a_file_that_was_only_touched_is_read_again_once(config, monkeypatch):
    path, checks = shard_of(config), []
    bank = ImageBank.open(config.data.bank)
    watch = Watch(bank, EpisodeShards.open(path.parent))
    monkeypatch.setattr(ImageBank, "verify", lambda _bank: checks.append(1))
    watch.require()
    assert checks == []
    os.utime(path, ns=(1, 1))
    watch.require()
    watch.require()
    assert checks == [1]
    with path.open("ab") as file:
        file.write(b"3")
    with pytest.raises(UserError, match="is of another size while it is in use"):
        watch.require()
    path.unlink()
    with pytest.raises(UserError, match="is gone while it is in use"):
        watch.require()
