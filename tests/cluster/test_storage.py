"""Everything at a URI, under Ray: an S3 server on loopback, kills and going on included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers_cluster import trained_steps
from helpers_faults import bits
from machinery import wait_until

from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.run_test import plan_test
from raymaml.storage.files import read_text, upload
from raymaml.training.checkpoint import list_steps
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

CPU = torch.device("cpu")
STEPS = (
    "outer.num_steps=60",
    "outer.validate_every=15",
    "outer.log_every=5",
    "episodes.test.num_episodes=240",
    "evaluation.chunk_size=20",
    "evaluation.baseline_episodes=0",
    "cluster.num_workers=2",
)


def test_training_and_campaign_at_a_uri_are_killed_and_go_on(
    make_config, tiny_bank, s3, s3_server, start
):
    lone = make_config("run", *STEPS)
    assert train_locally(lone, lambda _line: None)
    judge_locally(partial(plan_test, lone), lone.cluster, lambda _line: None)

    upload(tiny_bank.folder, s3 / "bank", last="bank.json")
    places = [f"data.bank={s3}/bank", f"data.shards={s3}/shards", f"run_dir={s3}/runs"]
    there = lone.data.shards.parent.with_name("there")
    config = make_config(there, *STEPS, *places, f"data.cache={there}/cache")
    path, folder = str(there / "config.yaml"), config.run_folder

    killed = start("train", path, **s3_server)
    killed.wait_until(lambda: trained_steps(folder) >= 20, "at step 20")
    killed.kill()
    assert max(list_steps(folder)) < 60
    again = start("train", path, **s3_server)
    assert again.finish() == 0, again.errors
    assert again.errors == ""
    assert again.lines[-1].startswith(f"{folder}: done; best validation accuracy")
    for which in ("last", "best"):
        assert bits(folder, which) == bits(lone.run_folder, which)

    judged = start("test", path, **s3_server)
    records = folder / "test" / "model"
    judged.wait_until(lambda: len(list(records.glob("*/*.parquet"))) >= 2, "two chunks further")
    judged.kill()
    assert len(list(records.glob("*/*.parquet"))) < 12
    again = start("test", path, **s3_server)
    assert again.finish() == 0, again.errors
    assert again.errors == ""
    assert again.lines[-1] == f"{folder}/test/summary.json"
    tables = [
        read_records(campaign.arms[0].records, 240).drop_columns("seconds")
        for campaign in (plan_test(config, CPU), plan_test(lone, CPU))
    ]
    assert tables[0].equals(tables[1], check_metadata=True)
    wait_until(lambda: not any(each.is_running() for each in judged.orphans), "rid of orphans")


SWEEP = """\
name: s
title: A sweep
config: config.yaml
space: {inner.lr: {grid: [0.1, 0.2]}}
scheduler: none
set: {outer.num_steps: 60}
max_concurrent_trials: 1
"""


def test_a_sweep_at_a_uri_is_stopped_and_goes_on_and_its_best_is_judged(
    make_config, s3, s3_server, start
):
    place = make_config("run", f"run_dir={s3}/runs", "outer.log_every=20").data.shards.parent
    (place / "s.yaml").write_text(SWEEP, encoding="utf-8")
    folder = s3 / "runs/sweeps/tiny/s"
    started = partial(start, cwd=place, **s3_server)

    stopped = started("sweep", "s.yaml")
    first = folder / "trial-00000"
    stopped.wait_until(lambda: len(list_steps(first)) >= 1, "at its first checkpoint")
    stopped.terminate()
    assert stopped.finish() == 143, stopped.errors
    said = read_text(first / "logs/rank-0.log")
    assert "stopped: it was asked to" in said
    assert list_steps(folder / "trial-00001") == []
    assert not (folder / "trial-00001" / "run.json").exists()

    again = started("sweep", "s.yaml")
    assert again.finish() == 0, again.errors
    path = f"{folder}/best/config.yaml"
    assert again.lines[-2:] == [f"judge it by: raymaml test {path}", f"{folder}/sweep.json"]
    judged = started("test", path, "--local")
    assert judged.finish() == 0, judged.errors
    assert judged.lines[-1] == f"{folder}/best/test/summary.json"
