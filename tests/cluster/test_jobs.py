"""A cluster that somebody else started: jobs submitted to it, and commands that join it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import site
import subprocess
import venv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers_cluster import SETTINGS, not_of_training, trained_steps
from machinery import ROOT, Nodes, fresh_shell, kill, wait_until

from raymaml.training.checkpoint import list_steps

pytestmark = pytest.mark.ray

SENT = {"raymaml", "configs", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}
"""What a job needs of the code."""


@pytest.fixture
def head(tmp_path_factory, short_folder) -> Iterator[Nodes]:
    """A cluster of one node that asks for a token, and the shell of somebody who has it."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32), encoding="utf-8")
    # a node that has all dependencies needs no registry
    environment = fresh_shell(home, PIP_NO_INDEX="1")
    environment.pop("PYTHONPATH", None)  # jobs bring their code along
    python = thin_python(home / "python")
    cluster = Nodes(short_folder / "head", 2, environment=environment, python=python)
    yield cluster
    cluster.close()


@pytest.mark.fault("job killed")
def test_a_job_that_is_stopped_killed_and_submitted_again_ends_in_the_bits_of_a_lone_process(
    head, short_folder, make_config, same_as_alone, start
):
    """Between the jobs a command that joins the cluster trains the run as well."""
    steps = ("outer.num_steps=300", "outer.validate_every=75")
    config = make_config("run", "name=job", "cluster.num_workers=2", *steps)
    place, folder = config.run_dir.parent, config.run_folder
    code = copy_of_the_code(place / "code")
    arguments = ("train", str(place / "config.yaml"))

    submitted = submit(code, head, *arguments, options="--no-wait --submission-id stopped")
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: trained_steps(folder) >= 10, "at step 10")
    stop = ("ray", "job", "stop", "--address", head.dashboard, "stopped")
    environment = {**head.environment, "RAY_AUTH_MODE": "token"}
    stopped = subprocess.run(stop, env=environment, check=True, capture_output=True, text=True)
    assert "was stopped" in stopped.stdout + stopped.stderr
    at = list_steps(folder)[-1]
    assert at == trained_steps(folder) < 300  # it saved what it had done

    assert submit(code, head, *arguments, options="--no-wait").returncode == 0
    wait_until(lambda: trained_steps(folder) >= at + 5, "five steps further")
    (driver,) = drivers(*arguments)
    kill([driver])

    joined = start(
        *arguments,
        cwd=ROOT,  # where the workers, too, find the code
        RAY_ADDRESS=head.address,
        HOME=head.environment["HOME"],  # where the token is
    )
    joined.wait_until(lambda: joined.lines != [], "about to train")
    at = trained_steps(folder)
    joined.wait_until(lambda: trained_steps(folder) >= at + 5, "five steps further")
    joined.terminate()
    assert joined.finish() == 143
    assert joined.errors == ""
    assert joined.lines[0] == f"{folder}: 2 CPU {SETTINGS}"
    assert trained_steps(folder) < 300

    job = submit(code, head, *arguments)
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(r"Job '\S+' succeeded", job.stdout)
    lines = of_the_job(job.stdout, folder)
    assert lines[0] == f"{folder}: 2 CPU {SETTINGS}"
    assert lines[-1].startswith(f"{folder}: done; best validation accuracy ")
    assert not_of_training(lines[1:-1]) == []
    same_as_alone(config, *steps)

    session = (short_folder / "head/ray/session_latest").resolve()
    (installed,) = session.glob("runtime_resources/pip/*/virtualenv/bin/raymaml")
    assert os.access(installed, os.X_OK)
    packages = session.glob("runtime_resources/working_dir_files/_ray_pkg_*")
    (sent,) = [path for path in packages if path.is_dir()]  # beside its archive
    assert {path.name for path in sent.iterdir()} - {"build", "raymaml.egg-info"} == SENT
    assert (sent / "raymaml/data/bank.py").is_file()


def drivers(*arguments: str) -> list[psutil.Process]:
    """Return the processes that a job runs with these arguments, without those that submit it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            same = process.cmdline()[-len(arguments) :] == list(arguments)
            if same and "RAY_JOB_CONFIG_JSON_ENV_VAR" in process.environ():
                found.append(process)
    return found


def of_the_job(output: str, folder: Path) -> list[str]:
    """Return what lies between the job's first line and its last, of all that is shown of it."""
    shown = output.splitlines()
    ours = [number for number, line in enumerate(shown) if line.startswith(f"{folder}: ")]
    return shown[ours[0] : ours[-1] + 1]


def submit(
    code: Path, head: Nodes, *arguments: str, options: str = ""
) -> subprocess.CompletedProcess[str]:
    """Submit a command and wait for its end; a head that has only just started takes no job yet."""
    jobs: list[subprocess.CompletedProcess[str]] = []

    def taken() -> bool:
        jobs.append(
            subprocess.run(
                ["bash", code / "launch" / "submit.sh", head.dashboard, *arguments],
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


def copy_of_the_code(folder: Path) -> Path:
    """Return a copy of the project beside which data and a run lie, which are not to travel."""
    folder.mkdir()
    for name in SENT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in (
        "data/bank/images.arrow",
        "runs/x/params.safetensors",
        "more.arrow",
        ".venv/python",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"large")
    return folder


def thin_python(folder: Path) -> Path:
    """Return a Python of its own that has our packages: Ray copies the environment for each job."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return folder / "bin" / "python"
