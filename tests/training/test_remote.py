"""Bank, shards, run folder and records at a URI, without Ray: the bits of the same run on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_faults import assert_same_bits, quiet

from raymaml.common.errors import StorageError, UserError
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import in_memory
from raymaml.data.shards import EpisodeShards
from raymaml.evaluation.campaign import Campaign, Chunk, judge_locally, replay_locally
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.run_test import plan_test
from raymaml.experiments.study import provide_data
from raymaml.reports.write import write_test_report
from raymaml.storage import cache
from raymaml.storage.files import upload
from raymaml.storage.place import Place
from raymaml.storage.temporary import own_name, partial_name
from raymaml.training.checkpoint import checkpoint_path, list_steps
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]


@pytest.fixture
def remote(make_config: MakeConfig, tiny_bank: ImageBank, s3: Place, tmp_path: Path) -> MakeConfig:
    """``remote(...)`` is the tiny config with everything at the URI."""
    upload(tiny_bank.folder, s3 / "bank", last="bank.json")
    places = {"data.bank": s3 / "bank", "data.shards": s3 / "shards", "run_dir": s3 / "runs"}
    places["data.cache"] = tmp_path / "cache"
    overrides = [f"{key}={place}" for key, place in places.items()]
    return lambda *more: make_config("remote", *overrides, *more)


def test_a_run_and_its_test_have_the_bits_of_those_on_disk(
    make_config: MakeConfig, remote: MakeConfig
) -> None:
    here, there = make_config("here"), remote()
    for config in (here, there):
        assert train_locally(config, quiet)
        write_test_report(judge_locally(partial(plan_test, config), config.cluster, quiet))
    assert there.run_folder != here.run_folder
    assert_same_bits(there, here)
    records = [
        read_records(plan.arms[0].records).drop_columns("seconds")
        for plan in (plan_test(here, CPU), plan_test(there, CPU))
    ]
    assert records[0].equals(records[1], check_metadata=True)
    names = {path.name for path in (there.run_folder / "test").iterdir()}
    assert {"report.html", "report.md", "summary.json", "arms.png", "tensorboard"} <= names
    metrics = [read_metrics(each.run_folder / METRICS_FILE) for each in (here, there)]
    losses = [[row.get("query_loss") for row in rows] for rows in metrics]
    assert losses[0] == losses[1]
    assert list((there.run_folder / "tensorboard").glob("events.*"))
    assert replay_locally(partial(plan_test, there), there.cluster, quiet) == 20


def test_a_campaign_that_lost_its_lease_ends(
    remote: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes over during the second of five chunks: two are there, no report."""
    config = remote("evaluation.chunk_size=2", "evaluation.baseline_episodes=0")
    train_locally(config, quiet)
    campaign, judge, judged = plan_test(config, CPU), Campaign.judge, []

    def overtaken(self: Campaign, chunk: Chunk) -> list[float]:
        judged.append(chunk.first)
        if len(judged) == 2:
            (self.folder / ".lock" / "00000002").write_bytes(b"{}")
        return judge(self, chunk)

    monkeypatch.setattr(Campaign, "judge", overtaken)
    with pytest.raises(UserError, match="another process has taken over"):
        judge_locally(partial(plan_test, config), config.cluster, quiet)
    assert judged == [0, 2]
    assert [chunk.first for chunk in campaign.missing()] == [4, 6, 8]
    assert not (campaign.folder / "summary.json").exists()


def test_a_run_goes_on_from_the_last_whole_checkpoint_at_the_uri(
    make_config: MakeConfig, remote: MakeConfig
) -> None:
    here, there = make_config("here"), remote()
    train_locally(here, quiet)
    train_locally(remote("outer.num_steps=3"), quiet)
    (checkpoint_path(there.run_folder, 4) / "params.safetensors").write_bytes(b"half")
    assert max(list_steps(there.run_folder)) == 3
    assert train_locally(there, quiet)
    assert max(list_steps(there.run_folder)) == 6
    assert_same_bits(there, here)


def test_the_copy_is_made_once_of_whole_data_and_shared(
    remote: MakeConfig, s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remote()
    place, copies = config.data.bank, config.data.cache
    bank = ImageBank.open(place, copies)
    assert bank.folder.parent == tmp_path / "cache"
    pixels = place / "images.arrow"
    content = bytearray(pixels.read_bytes())
    content[len(content) // 2] ^= 1
    pixels.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"^{pixels}: is altered"):
        ImageBank.open(place, tmp_path / "new")
    assert not [path for path in (tmp_path / "new").iterdir() if path.is_dir()]
    pixels.unlink()
    assert ImageBank.open(place, copies).folder == bank.folder
    with pytest.raises(UserError, match=rf"^{s3}/none/bank.json: does not exist"):
        ImageBank.open(s3 / "none", copies)

    # a full disk is not blamed on the URI, and what a kill left is removed
    left = bank.folder.rename(bank.folder.with_name(own_name(partial_name(bank.folder.name))))

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_download", full)
    with pytest.raises(StorageError, match=rf"^{bank.folder}: cannot be .*; make room there"):
        ImageBank.open(place, copies)
    assert not left.exists()


def test_a_shard_that_is_not_the_manifest_s_is_named_by_its_uri(remote: MakeConfig) -> None:
    config = remote()
    folder = config.data.shards / "val"
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^{shard}: is truncated or altered"):
        EpisodeShards.open(folder, config.data.cache / "other")
    shard.unlink()
    with pytest.raises(UserError, match=rf"^{folder}: lacks a file that its manifest.json names"):
        EpisodeShards.open(folder, config.data.cache / "other")


def test_an_import_writes_to_the_uri_and_keeps_what_is_there(remote: MakeConfig, s3: Place) -> None:
    config = remote()
    black = in_memory("black", "train", np.zeros((2, 16, 16, 1), np.uint8))
    about: dict[str, Any] = {"source": "x", "licence": "x", "image_shape": (1, 16, 16)}
    write = partial(write_bank, classes=[black], cache=config.data.cache, **about)
    before = (config.data.bank / "bank.json").read_bytes()
    with pytest.raises(UserError, match=rf"^{config.data.bank}: holds another image bank"):
        write(config.data.bank)
    assert (config.data.bank / "bank.json").read_bytes() == before
    (s3 / "new" / "images.arrow").write_bytes(b"what a killed import left")
    assert write(s3 / "new").num_images == 2


def test_a_run_that_another_process_took_over_writes_no_checkpoint(remote: MakeConfig) -> None:
    config = remote()

    def take_over(line: str) -> None:
        if line.startswith("step 2/6 "):
            (config.run_folder / ".writer" / "00000002").write_bytes(b"{}")

    with pytest.raises(UserError, match=r"\.writer: another process has taken over"):
        train_locally(config, take_over)
    assert list_steps(config.run_folder) == [0]


def test_data_that_cannot_be_reached_are_one_message(
    remote: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remote()

    def no_credentials(*_arguments: object, **_options: object) -> bool:
        raise LookupError("Unable to locate credentials")

    monkeypatch.setattr(type(config.data.bank), "exists", no_credentials)
    with pytest.raises(UserError, match=r"bank\.json: cannot be reached \(Unable to locate cred"):
        provide_data(config.data, config.episodes, quiet)
