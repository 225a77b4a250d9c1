"""Shell scripts parse and are clean; every command in launch/ is one that raymaml takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from helpers_launch import LAUNCH, ROOT, commands, read

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.load import load_config

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
FILES = sorted(path.name for path in LAUNCH.iterdir() if path.is_file() and path.suffix != ".md")
WITH_COMMANDS = ["aws.yaml", "gcp.yaml", "quickstart.sh", "rayjob.yaml", "slurm.sh", "submit.sh"]


def test_there_are_files() -> None:
    assert set(SCRIPTS) >= {"quickstart.sh", "slurm.sh", "submit.sh", "test.sh"}
    assert set(FILES) >= {"aws.yaml", "gcp.yaml", "rayjob.yaml", "runtime_env.yaml"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses_and_shellcheck_has_nothing_to_say(name: str) -> None:
    for check in (["bash", "-n"], ["shellcheck", "--external-sources"]):
        tool = shutil.which(check[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert tool, f"{check[0]} is not installed: pip install raymaml[test]"
        done = subprocess.run(
            [tool, *check[1:], f"launch/{name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in FILES if name != "environment.sh"])
def test_a_file_says_what_it_is_for_and_how_to_use_it(name: str) -> None:
    head = (LAUNCH / name).read_text("utf-8").removeprefix("#!/usr/bin/env bash\n").split("\n")
    comment = head[: next(i for i, line in enumerate(head) if not line.startswith("#"))]
    assert any(line.startswith("#   ") for line in comment), "no command"
    if name not in {"quickstart.sh", "test.sh"}:  # those run here, whole
        text = "\n".join(comment)
        assert "# Tested: " in text
        assert "Not: " in text
    assert max(map(len, head)) <= 120


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_a_command_in_a_file_is_one_that_raymaml_takes(name: str) -> None:
    text = (LAUNCH / name).read_text("utf-8")
    found = commands(text)
    if name == "quickstart.sh":
        found = commands(text.replace('"$config" "$@"', "configs/own_images.yaml"))
        assert len(found) == 4
    if name == "rayjob.yaml":
        found = [rayjob_command()]
    assert found
    for command in found:
        check(command)


def rayjob_command() -> list[str]:
    """The entrypoint, with the config that the header's command puts where it reads it."""
    entrypoint = read("rayjob.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[0] == "raymaml"
    header = (LAUNCH / "rayjob.yaml").read_text("utf-8")
    assert "create configmap raymaml --from-file=config.yaml=configs/" in header
    config = header.split("--from-file=config.yaml=")[1].split()[0]
    return [config if word == "/configs/config.yaml" else word for word in entrypoint[1:]]


def check(words: list[str]) -> None:
    """Fail unless the command line has this command with these options, and it takes the config."""
    command: click.Command = main
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    parsed = command.make_context(command.name, list(words)).params
    # Google's storage needs a package of its own, raymaml[gs]; a bucket is a bucket.
    overrides = [each.replace("gs://", "s3://") for each in parsed["overrides"]]
    config = load_config(ROOT / parsed["config_path"], overrides)
    assert config.name


@pytest.mark.parametrize(
    "line", ["raymaml trian configs/own_images.yaml", "raymaml train configs/none.yaml"]
)
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check(commands(line)[0])


def test_submit_sends_the_runtime_environment_with_the_checksum_of_the_dependencies(
    tmp_path: Path,
) -> None:
    """By a ``ray`` that only writes down what it is asked for; jobs are in cluster/test_jobs.py."""
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\ncat "$8"\n', encoding="utf-8")
    ray.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / "submit.sh", "http://127.0.0.1:1", "test", "c.yaml", "a=1"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    line, sent = done.stdout.split("\n", 1)
    assert line.startswith("job submit --address http://127.0.0.1:1 --working-dir . --runtime-env")
    assert line.endswith(" -- raymaml test c.yaml a=1")
    checksum = subprocess.check_output(["cksum", "setup.cfg"], cwd=ROOT, text=True)
    shipped = read("runtime_env.yaml")
    shipped["pip"]["packages"][1] = f"# {checksum.strip()}"
    assert yaml.safe_load(sent) == shipped


def test_submit_without_a_command_shows_how_it_is_used() -> None:
    done = subprocess.run(
        ["bash", LAUNCH / "submit.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "bash launch/submit.sh ADDRESS COMMAND" in done.stderr
