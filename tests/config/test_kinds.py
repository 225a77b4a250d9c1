"""A file of another kind than the command needs is named as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from raymaml.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = {
    "config": CONFIGS / "glyphs" / "quickstart.yaml",
    "study": CONFIGS / "studies" / "tasknorm.yaml",
    "sweep": CONFIGS / "sweeps" / "glyphs-asha.yaml",
}
NEEDS = {
    "data import": "config",
    "data sample": "config",
    "data show": "config",
    "train": "config",
    "test": "config",
    "report": "config",
    "audit": "config",
    "doctor": "config",
    "bench": "config",
    "study": "study",
    "sweep": "sweep",
}
TITLES = {"config": "a config", "study": "a study file", "sweep": "a sweep file"}


def message(command: str, *arguments: object) -> str:
    outcome = CliRunner().invoke(main, [*command.split(), *map(str, arguments)])
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    (line,) = outcome.output.splitlines()
    return line


@pytest.mark.parametrize("command", NEEDS)
@pytest.mark.parametrize("kind", FILES)
def test_each_command_says_which_one_a_file_is_for(command: str, kind: str) -> None:
    if kind == NEEDS[command]:
        return
    said = message(command, FILES[kind])
    needed = TITLES[NEEDS[command]]
    start = f"raymaml: {FILES[kind]}: is {TITLES[kind]}, and {needed} is needed here; use "
    assert said.startswith(start)
    own = "train" if kind == "config" else kind
    assert f"`raymaml {own} {FILES[kind]}`" in said


@pytest.mark.parametrize("option", ["study", "sweep"])
def test_a_config_option_needs_a_config(option: str) -> None:
    said = message(option, FILES[option], "--config", FILES["study"])
    assert "tasknorm.yaml: is a study file, and a config is needed here" in said


@pytest.mark.parametrize("command", ["train", "study", "sweep"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema_version": 3, "arms": {}}', ": is a file that raymaml writes, and a"),
        ("dependencies: [torch]\nchannels: [x]\n", ": its keys are dependencies, channels; a "),
        ("", ": holds no mapping (it is empty); expected keys such as name, data, outer"),
        ("- a\n", ": holds no mapping (but a list); expected keys such as name, data, outer"),
        ("a\n", ": holds no mapping (but one value); expected keys such as name, data, outer"),
    ],
)
def test_a_file_of_no_kind_is_said_to_be_that(
    tmp_path: Path, command: str, text: str, says: str
) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    assert says in message(command, path)


@pytest.mark.parametrize("command", ["train", "study", "sweep"])
def test_a_folder_is_not_a_file(tmp_path: Path, command: str) -> None:
    assert message(command, tmp_path) == (
        f"raymaml: {tmp_path}: cannot be read (Is a directory); give a file: the config of a run is"
        " config.yaml in the run's folder"
    )
