"""A cluster that somebody else started: jobs submitted to it, and commands that join it."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cluster import (
    SETTINGS,
    assert_same_bits,
    free_ports,
    kill_with_children,
    start_node,
    trained_steps,
    wait_until,
)

from raymaml.training.checkpoint import list_steps
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    """A cluster of one node that asks for a token, and the shell of somebody who has it."""

    address: str
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory, short_folder) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32), encoding="utf-8")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    programs = Path(sys.executable).parent
    environment = {**inherited, "HOME": str(home), "PATH": f"{programs}:{inherited['PATH']}"}
    environment.pop("PYTHONPATH", None)  # jobs bring their code along
    port, dashboard_port = free_ports(2)
    process = start_node(
        home / "head.txt",
        environment,
        *("--head", f"--port={port}", "--num-cpus=2"),
        *(f"--dashboard-port={dashboard_port}", f"--temp-dir={short_folder / 'head'}"),
    )
    try:
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", environment)
    finally:
        kill_with_children(process)


def test_a_submitted_job_ends_in_the_bits_of_a_lone_process(head, tmp_path, make_config, weights):
    lone = make_config("run", "name=lone")
    assert train_locally(lone, lambda _line: None)
    config = make_config("run", "name=job", "cluster.num_workers=2")

    job = submit(head, "train", str(tmp_path / "run/config.yaml"))

    assert job.returncode == 0, job.stdout + job.stderr
    assert f"{config.run_folder}: 2 CPU {SETTINGS}\n" in job.stdout
    assert re.search(r"Job '\S+' succeeded", job.stdout)
    assert_same_bits(weights(config.run_folder), weights(lone.run_folder))


def test_a_stopped_job_has_saved_where_it_stands(head, tmp_path, make_config, weights):
    """`ray job stop` sends SIGTERM, and 3 s later SIGKILL."""
    config = make_config(
        "run", "name=stopped", "outer.num_steps=100000", "outer.validate_every=100"
    )
    folder = config.run_folder
    path = str(tmp_path / "run/config.yaml")
    submit(head, "train", path, options="--no-wait --submission-id=stopped")
    wait_until(lambda: trained_steps(folder) >= 5, "at step 5")

    stop = subprocess.run(
        ["ray", "job", "stop", "--address", head.dashboard, "stopped"],
        env={**head.environment, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert stop.returncode == 0, stop.stdout + stop.stderr
    stopped_at = list_steps(folder)[-1]
    assert trained_steps(folder) == stopped_at >= 5
    lone = make_config(
        "run", "name=lone", "outer.validate_every=100", f"outer.num_steps={stopped_at}"
    )
    assert train_locally(lone, lambda _line: None)
    assert_same_bits(weights(folder), weights(lone.run_folder))


def test_a_command_joins_the_cluster_that_ray_address_names(
    head, tmp_path, make_config, weights, start
):
    lone = make_config("run", "name=lone")
    assert train_locally(lone, lambda _line: None)
    config = make_config("run", "name=joined")

    command = start(
        *("train", str(tmp_path / "run/config.yaml")),
        cwd=ROOT,  # where the workers, too, find the code
        RAY_ADDRESS=head.address,
        HOME=head.environment["HOME"],  # where the token is
    )

    assert command.finish() == 0, command.errors
    assert command.errors == ""
    assert command.lines[0] == f"{config.run_folder}: 1 CPU {SETTINGS}"
    assert_same_bits(weights(config.run_folder), weights(lone.run_folder))


def submit(head: Head, *arguments: str, options: str = "") -> subprocess.CompletedProcess[str]:
    """Submit a command and wait for its end; a head that has only just started takes no job yet."""
    jobs: list[subprocess.CompletedProcess[str]] = []

    def taken() -> bool:
        jobs.append(
            subprocess.run(
                ["bash", ROOT / "launch" / "submit.sh", head.dashboard, *arguments],
                env={**head.environment, "RAYMAML_SUBMIT": options},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
        )
        return "No available agent to submit job" not in jobs[-1].stderr

    wait_until(taken, "taken as a job")
    return jobs[-1]
