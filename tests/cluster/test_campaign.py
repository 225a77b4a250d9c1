"""Ray Tune: the records of a lone process, whatever the chunks and whatever befalls them."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from helpers_cluster import RATE
from helpers_faults import quiet
from machinery import Command

from raymaml.cluster import campaign as on_cluster
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.evaluation import campaign as in_process
from raymaml.evaluation.campaign import Campaign
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.run_test import plan_test
from raymaml.experiments.study import plan_study, run_study
from raymaml.experiments.study_file import read_study
from raymaml.reports.write import write_test_report
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

ARMS = ("model", "no-adaptation", "untrained")
SETTINGS = (
    "1 CPU worker(s) of 1 thread(s), freed memory is kept, channels_last, float32; chunks of up to"
)
LINE = re.compile(
    rf" *\d+/200 episodes  [0-4]/4 arms done  \S.* \d+\.\d\d( \+- \d+\.\d\d)?% over \d+  {RATE}"
)


def judge_locally(config: Config, echo: Callable[[str], None]) -> Path:
    return write_test_report(
        in_process.judge_locally(partial(plan_test, config), config.cluster, echo)
    )


def judge_on_cluster(config: Config, echo: Callable[[str], None]) -> Path:
    return write_test_report(
        on_cluster.judge_on_cluster(partial(plan_test, config), config.cluster, echo)
    )


def trained(make_config, *overrides: str) -> Config:
    """Train one outer step and return the config; 10 test episodes, 5 of each baseline."""
    config = make_config("run", "name=trained", "outer.num_steps=1", *overrides)
    assert train_locally(config, quiet)
    return config


def copy_of(config: Config, name: str, chunk_size: int) -> Config:
    """Return a config of the same run under another name, not judged yet."""
    evaluation = config.evaluation.model_copy(update={"chunk_size": chunk_size})
    copy = config.model_copy(update={"name": name, "evaluation": evaluation})
    shutil.copytree(config.run_folder, copy.run_folder)
    return copy


def records(config: Config) -> dict[str, pa.Table]:
    """Return the records of each arm; their schema carries the identity of what was judged."""
    folders = {arm: list((config.run_folder / "test" / arm).iterdir()) for arm in ARMS}
    assert [len(found) for found in folders.values()] == [1, 1, 1]
    return {arm: read_records(found[0]).drop(["seconds"]) for arm, found in folders.items()}


def assert_same_records(config: Config, expected: Config) -> None:
    """All but the seconds, which no two judgements share."""
    found, wanted = records(config), records(expected)
    for arm in ARMS:
        assert found[arm].equals(wanted[arm], check_metadata=True), arm


def chunk_files(config: Config) -> dict[Path, int]:
    """Return when each chunk was written."""
    files = (config.run_folder / "test").glob("*/*/*.parquet")
    return {file: file.stat().st_mtime_ns for file in sorted(files)}


@pytest.mark.fault("records torn")
def test_the_partition_leaves_no_trace_and_only_lost_chunks_are_judged_again(cluster, make_config):
    config = trained(make_config)
    lone = copy_of(config, "lone", 4)
    judge_locally(lone, quiet)
    for chunk_size, num_chunks in ((1, 20), (7, 4)):  # 10 + 5 + 5; (7 + 3) + 5 + 5
        together = copy_of(config, f"by-{chunk_size}", chunk_size)
        lines: list[str] = []
        summary = judge_on_cluster(together, lines.append)
        assert summary == together.run_folder / "test" / "summary.json"
        assert len(chunk_files(together)) == num_chunks
        assert_same_records(together, lone)
        assert lines[0] == f"{together.run_folder}/test: {SETTINGS} {chunk_size} episodes"
        assert len(lines) == 1 + num_chunks
        assert lines[-1].startswith("20/20 episodes")

    before = chunk_files(together)
    deleted, torn = list(before)[1], list(before)[3]
    assert (deleted.parent.parent.name, torn.parent.parent.name) == ("model", "untrained")
    deleted.unlink()
    torn.write_bytes(torn.read_bytes()[:-9])
    lines.clear()
    judge_on_cluster(together, lines.append)
    after = chunk_files(together)
    assert [file for file in before if after[file] != before[file]] == [deleted, torn]
    assert len(lines) == 1 + 2
    assert lines[-1].startswith("20/20 episodes")
    assert_same_records(together, lone)

    lines.clear()
    judge_on_cluster(together, lines.append)  # nothing is left to do
    assert chunk_files(together) == after
    assert lines == []


def test_a_campaign_that_lost_its_lease_ends(joining, make_config, monkeypatch):
    """Another process takes over while chunks are judged: no report is written."""
    config = trained(make_config, "evaluation.chunk_size=1")
    looks = []

    @contextlib.contextmanager
    def overtaken(_campaign):
        def require_held():
            looks.append(None)
            if len(looks) > 2:
                raise UserError("another process has taken over")

        yield require_held

    monkeypatch.setattr(Campaign, "sole_judge", overtaken)
    with pytest.raises(UserError, match="another process has taken over"):
        judge_on_cluster(config, quiet)
    assert len(looks) > 2
    assert not (config.run_folder / "test" / "summary.json").exists()


STUDY = """\
name: kills
title: Kills
config: config.yaml
models: {one: {}, two: {model.norm: context}}
arms: [{name: a, model: one}, {name: b, model: two}]
cross: {evaluation.inner.num_steps: [1, 2]}
"""


@pytest.mark.fault("campaign killed")
def test_a_study_that_is_interrupted_and_killed_ends_in_the_records_of_one_that_is_not(
    joining, tmp_path, make_config, start
):
    overrides = ("outer.num_steps=1", "episodes.test.num_episodes=50", "evaluation.chunk_size=1")
    for place in ("lone", "disturbed"):
        config = make_config(place, *overrides)
        (tmp_path / place / "study.yaml").write_text(STUDY, encoding="utf-8")
    lone, disturbed = (read_study(tmp_path / p / "study.yaml") for p in ("lone", "disturbed"))
    run_study(lone, train=train_locally, judge=in_process.judge_locally, echo=quiet)
    folder = config.run_dir / "studies" / "tiny"

    def chunks() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.glob("records/*/*.parquet")}

    def twelve_further() -> Command:
        so_far = len(chunks())
        command = start("study", str(tmp_path / "disturbed/study.yaml"), **joining)
        command.wait_until(lambda: len(chunks()) >= so_far + 12, "12 chunks further")
        return command

    command = twelve_further()
    command.interrupt()
    assert command.finish() == 130
    assert command.errors == (
        "raymaml: interrupted; what is written is kept: run the same command to go on\n"
    )
    ours = f"{folder}/kills: {SETTINGS} 1 episodes"
    judging = command.lines[command.lines.index(ours) + 1 :]
    assert [line for line in judging if not LINE.fullmatch(line)] == []
    seen = [chunks()]
    for _ in range(2):
        command = twelve_further()
        command.kill()
        command.clean_up()
        seen.append(chunks())
    assert len(seen[-1]) < 4 * 50
    run_study(disturbed, train=train_locally, judge=on_cluster.judge_on_cluster, echo=quiet)

    assert seen[0].items() <= seen[1].items() <= seen[2].items() <= chunks().items()
    cpu = torch.device("cpu")
    found, expected = (plan_study(study, cpu).results() for study in (disturbed, lone))
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert len(one.records) == 50
        tables = [each.records.drop(["seconds"]) for each in (one, other)]
        assert tables[0].equals(tables[1], check_metadata=True), one.name
    assert (folder / "kills" / "report.html").is_file()
    assert list(folder.rglob(".tune")) == []
