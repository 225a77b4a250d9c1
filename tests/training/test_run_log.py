"""The log of a worker: run, rank and step before each message, and the error that ends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers_faults import quiet

from raymaml.common.logs import LOG
from raymaml.config.schema import Config
from raymaml.storage.place import to_place
from raymaml.training.checkpoint import list_steps
from raymaml.training.data import open_training_data
from raymaml.training.run import open_run
from raymaml.training.session import LocalSession
from raymaml.training.worker import run_log, train_locally, train_worker

CPU = torch.device("cpu")
STARTS = r"starts at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00 on \S+, cpu, one of 1 worker\(s\)"
VALIDATION = (
    r"validation accuracy \d+\.\d\d \+- \d+\.\d\d%, loss \d\.\d{4}, over 4 episodes, 4 of them"
    " judged here"
)


def lines_of(config: Config) -> list[str]:
    return (config.run_folder / "logs/rank-0.log").read_text(encoding="utf-8").splitlines()


def assert_lines(found: list[str], *expected: str) -> None:
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_run_and_its_continuation(make_config: Any) -> None:
    assert train_locally(make_config("run", "outer.num_steps=3"), quiet)
    config = make_config("run", "outer.num_steps=4")
    first = lines_of(config)
    assert_lines(
        first,
        f"tiny rank 0 step -: {STARTS}",
        "tiny rank 0 step 0: begins with the initial weights",
        f"tiny rank 0 step 0: {VALIDATION}",
        "tiny rank 0 step 0: checkpoint checkpoint_00000000",
        f"tiny rank 0 step 3: {VALIDATION}",
        "tiny rank 0 step 3: checkpoint checkpoint_00000003",
        "tiny rank 0 step 3: done",
    )
    assert train_locally(config, quiet)
    assert lines_of(config)[:7] == first
    assert_lines(
        lines_of(config)[7:],
        f"tiny rank 0 step -: {STARTS}",
        "tiny rank 0 step 3: goes on from checkpoint_00000003",
        "tiny rank 0 step 3: checkpoint checkpoint_00000003",
        f"tiny rank 0 step 4: {VALIDATION}",
        "tiny rank 0 step 4: checkpoint checkpoint_00000004",
        "tiny rank 0 step 4: done",
    )


def train(config: Config, session: LocalSession) -> None:
    config.run_folder.mkdir(parents=True)
    train_worker(open_run(config, CPU), session, quiet)


def test_a_stop_is_noted(make_config: Any) -> None:
    config = make_config("run")
    train(config, LocalSession(open_training_data(config, CPU), CPU, stop=lambda: True))
    assert lines_of(config)[-1] == "tiny rank 0 step 1: stopped: it was asked to"


class Failing(LocalSession):
    """Has meta-batches for the first two outer steps."""

    def meta_batches(self, first_step: int) -> Iterator[Any]:
        batches = super().meta_batches(first_step)
        yield from (next(batches) for _ in range(2))
        raise OSError("the disk\nis gone")


def test_an_error_has_its_traceback_and_its_step_on_each_line(make_config: Any) -> None:
    config = make_config("run")
    with pytest.raises(OSError, match="the disk"):
        train(config, Failing(open_training_data(config, CPU), CPU))
    lines = lines_of(config)
    start = lines.index("tiny rank 0 step 2: stopped by OSError")
    assert lines[start + 1] == "tiny rank 0 step 2: Traceback (most recent call last):"
    assert lines[-2:] == ["tiny rank 0 step 2: OSError: the disk", "tiny rank 0 step 2: is gone"]
    assert all(line.startswith("tiny rank 0 step 2: ") for line in lines[start:])


def test_a_mistake_of_the_users_has_no_traceback(make_config: Any) -> None:
    config = make_config("run", "inner.lr=1e38")
    with pytest.raises(Exception, match="not finite"):
        train_locally(config, quiet)
    assert "stopped by an error: outer step 0: validation episode" in lines_of(config)[-1]
    assert not any("Traceback" in line for line in lines_of(config))


def test_a_log_that_cannot_be_written_stops_nothing(make_config: Any) -> None:
    config = make_config("run")
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "logs").write_text("in the way", encoding="utf-8")
    assert train_locally(config, quiet)
    assert list_steps(config.run_folder)[-1] == 6


def test_at_a_uri_lines_are_added_as_well_and_only_those_of_the_block(make_config: Any) -> None:
    session = LocalSession(open_training_data(make_config("run"), CPU), CPU)
    folder = to_place("memory://test-run-log/run")
    for _ in range(2):
        with run_log(folder, "far", session):
            LOG.info("inside")
        LOG.info("outside")
    text = (folder / "logs" / "rank-0.log").read_text(encoding="utf-8")
    once = (f"far rank 0 step -: {STARTS}", "far rank 0 step -: inside")
    assert_lines(text.splitlines(), *once, *once)
