"""launch/slurm.sh: Ray's nodes, the run, the signal before the time limit, and the queue again.

Slurm itself is stood in for: an ``srun`` that starts the tasks on this machine, and an ``scontrol``
that writes down what it is asked for. So this is about what the script does with Ray and with
signals; what Slurm does with the script was tried by hand.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers_cluster import SETTINGS, trained_steps
from machinery import ROOT, fresh_shell, kill, wait_until

from raymaml.training.checkpoint import list_steps

pytestmark = [pytest.mark.ray, pytest.mark.nightly]

SRUN = """\
#!/usr/bin/env bash
for ((SLURM_PROCID = 0; SLURM_PROCID < SLURM_NNODES; SLURM_PROCID++)); do
    export SLURM_PROCID
    "${@: -3}" &
done
wait
"""
JOB = "70001"
Script = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """``script("train", ...)`` runs launch/slurm.sh as a job of two nodes with one CPU each."""
    programs = {
        "srun": SRUN,
        "scontrol": f'#!/bin/sh\necho "$@" >>{tmp_path}/scontrol.txt\n',
        "raymaml": f'#!/bin/sh\nexec {sys.executable} -m raymaml "$@"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = fresh_shell(tmp_path, SLURM_JOB_ID=JOB, SLURM_NNODES="2", SLURM_CPUS_ON_NODE="1")
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "output.txt").open("ab") as output:
            return subprocess.Popen(
                ["bash", ROOT / "launch" / "slurm.sh", *arguments],
                cwd=tmp_path,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    yield run
    end_job(tmp_path)
    shutil.rmtree(f"/tmp/ray-{JOB}", ignore_errors=True)


def end_job(home: Path) -> None:
    """End what is left of a job, as Slurm does."""
    kill([each for each in psutil.process_iter() if environ(each).get("HOME") == str(home)])


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_a_job_that_is_out_of_time_saves_is_queued_again_and_goes_on(
    script: Script, tmp_path, make_config, same_as_alone
):
    steps = ("outer.num_steps=150", "outer.validate_every=75")
    config = make_config("run", "name=job", "cluster.num_workers=2", *steps)
    folder = config.run_folder
    command = ("train", str(tmp_path / "run/config.yaml"))
    output, asked = tmp_path / "output.txt", tmp_path / "scontrol.txt"

    first = script(*command)
    wait_until(lambda: trained_steps(folder) >= 10 or first.poll() is not None, "at step 10")
    assert first.poll() is None, output.read_text()
    first.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@120 does, to the script alone
    assert first.wait(timeout=300) == 130, output.read_text()
    assert list_steps(folder)[-1] == trained_steps(folder) < 150
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    assert asked.read_text() == f"requeue {JOB}\n"
    end_job(tmp_path)

    second = script(*command)
    assert second.wait(timeout=300) == 0, output.read_text()
    assert output.read_text().count(f"{folder}: 2 CPU {SETTINGS}\n") == 2
    assert asked.read_text().count("requeue") == 1
    same_as_alone(config, *steps)
