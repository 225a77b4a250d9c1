"""The command itself: interrupted, killed, run again; and what it prints."""

from __future__ import annotations

import re
import socket

import psutil
import pytest
from helpers_cluster import SETTINGS, not_of_training, trained_steps
from machinery import Command, title, wait_until

from raymaml.training.checkpoint import list_steps

pytestmark = pytest.mark.ray

STEPS = ("outer.num_steps=150", "outer.validate_every=25")


@pytest.mark.fault("driver killed")
@pytest.mark.fault("driver interrupted")
def test_an_interrupted_then_killed_run_ends_in_the_bits_of_an_undisturbed_one(
    tmp_path, make_config, same_as_alone, start
):
    config = make_config("run", "name=disturbed", *STEPS)
    folder = config.run_folder
    command = ("train", str(tmp_path / "run/config.yaml"))

    interrupted = start(*command)
    interrupted.wait_until(lambda: trained_steps(folder) >= 10, "at step 10")
    interrupted.interrupt()
    assert interrupted.finish() == 130
    stopped_at = list_steps(folder)[-1]
    assert 10 <= stopped_at < 100
    assert_only_our_lines(
        interrupted,
        first=f"{folder}: 1 CPU {SETTINGS}",
        last=f"{folder}: stopped before outer step {stopped_at} of 150, and saved; run the same"
        " command to go on",
    )
    assert trained_steps(folder) == stopped_at

    killed = start(*command)
    killed.wait_until(lambda: trained_steps(folder) >= stopped_at + 10, "ten steps further")
    killed.kill()
    assert trained_steps(folder) < 150

    finished = start(*command)  # while the worker of the killed run may live on for a while
    assert finished.finish() == 0
    wait_until(lambda: not workers_of(killed), "rid of the killed run's workers")
    best = r"best validation accuracy \S+ \+- \S+% before outer step \d+"
    assert_only_our_lines(
        finished,
        first=f"{folder}: 1 CPU {SETTINGS}",
        last=re.compile(f"{re.escape(str(folder))}: done; {best}"),
    )
    same_as_alone(config, *STEPS)


@pytest.mark.fault("cluster absent")
def test_a_cluster_that_does_not_answer_is_one_message(tmp_path, make_config, start):
    make_config("run")
    with socket.socket() as reserved:  # bound and not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        command = start("train", str(tmp_path / "run/config.yaml"), RAY_ADDRESS=address)
        assert command.finish() == 2

    assert command.lines == []
    message = (
        rf"raymaml: RAY_ADDRESS is {address}: no Ray cluster answers there \(.*refused\); start one"
        r" with `ray start --head`, or unset RAY_ADDRESS to run on this machine\n"
    )
    assert re.fullmatch(message, command.errors)


def assert_only_our_lines(command: Command, *, first: str, last: str | re.Pattern[str]) -> None:
    """Every line is a known one: nothing of Ray, no warning, no traceback, no colour."""
    lines = command.lines
    assert lines[0] == first
    assert re.fullmatch(last if isinstance(last, re.Pattern) else re.escape(last), lines[-1])
    assert not_of_training(lines[1:-1]) == []
    assert command.errors == ""


def workers_of(command: Command) -> list[psutil.Process]:
    """Return the training workers of a command that live."""
    return [process for process in command.orphans if title(process) == "ray::RayTrainWorker"]
