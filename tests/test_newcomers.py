"""First tries at the command line and at a config: each mistake gets the message that helps.

``config`` is a config that is right; a text that begins as in ``OF_A_FILE`` is that of a file.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from raymaml.cli import main

CONFIG = """\
name: a
data: {source: {kind: glyphs}, bank: bank, shards: shards}
episodes: {train: {num_episodes: 1}, val: {num_episodes: 1}, test: {num_episodes: 1}}
outer: {num_steps: 5}
"""
OF_A_FILE = ("{", "name: ", "#")
SECTION = "it should be a section of keys and values"
STUDY = "name: s\ntitle: T\nconfig: nowhere.yaml\narms: [{name: a}]\n"
SWEEP = "name: s\ntitle: T\nconfig: nowhere.yaml\nspace: {outer.lr: {choice: [1]}}\nnum_trials: 1\n"

CASES = {
    "dashes before an override": ("train config --outer.lr=0.1", "has no dashes: outer.lr=value"),
    "dashes and a space": ("train config --outer.lr 0.1", "has no dashes: outer.lr=value"),
    "an option that is none": ("train config --steps=3", "No such option '--steps'"),
    "an option before the command": ("--verbose train config", "stand behind its name"),
    "an override before the config": ("train outer.lr=1 config", "they stand behind CONFIG"),
    "an override instead of a config": ("doctor outer.lr=1", "they stand behind CONFIG"),
    "spaces around the sign": ("train config outer.lr = 1", "as in outer.lr=1e-3, without spaces"),
    "a key without a value": ("train config outer.lr=", "outer.lr is empty, which YAML reads"),
    "two points": ("train config outer..lr=3", "outer..lr=3: is not an override"),
    "no such command": ("tain", "No such command 'tain'"),
    "no arguments": ("train", "Missing argument 'CONFIG'"),
    "no text": ("train ''", "it should be a path, or a URI such as"),
    "an unknown protocol": ("train foo://x", "Unsupported filesystem: 'foo'"),
    "a number for a section": ("train config outer=5", f"outer is 5; {SECTION}"),
    "text for a section": ("train config model=convnet4", f"model is 'convnet4'; {SECTION}"),
    "a kind for a source": ("train config data.source=glyphs", ": write {kind: glyphs}"),
    "a kind in capitals": ("train config data.source.kind=Glyphs", "did you mean glyphs?"),
    "a key that is a tag": ("train config cluster.precision=fp16", "cluster.precision is 'fp16'"),
    "a number for a list": ("train config outer.milestones=3", "should be a list: write [3]"),
    "too few of a list": ("train config model.width=[1,2,3]", "model.width has no value number 4"),
    "an empty mapping": ("train config model.norm={}", "it should have at least 1 item"),
    "a name with a space": ("train config 'name=a b'", "hold only letters a-z, digits, . _ and -"),
    "dotted keys in a file": ("train {outer.num_steps: 3, data: {}}", "outer: {num_steps: ...}"),
    "a config in a section": ("train {config: {name: a}}", "is not a config: its keys are config"),
    "several documents": ("train {name: a}\n---\n{name: b}\n", "expected a single document"),
    "a null byte": ("train name: a\0", "unacceptable character #x0000"),
    "a study without its config": (f"study {STUDY}", "config is 'nowhere.yaml', and there is no "),
    "a sweep without its config": (f"sweep {SWEEP}", "config is 'nowhere.yaml', and there is no "),
}


@pytest.mark.parametrize("case", CASES)
def test_a_first_try_gets_the_message_that_helps(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, says = CASES[case]
    command, _, text = line.partition(" ")
    (tmp_path / "config").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    if text.startswith(OF_A_FILE) or not text.strip():
        (tmp_path / "text").write_text(text, encoding="utf-8")
        words = [command, "text"] if text else [command]
    outcome = CliRunner().invoke(main, words)
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    assert isinstance(outcome.exception, SystemExit)
    assert says in " ".join(outcome.output.split())


def test_a_config_may_lie_in_a_folder_that_looks_like_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("lr=0.1/config.yaml")
    path.parent.mkdir()
    path.write_text(CONFIG.replace("num_steps: 5", "num_steps: -5"), encoding="utf-8")
    outcome = CliRunner().invoke(main, ["train", str(path)])
    assert outcome.exit_code == 2
    assert outcome.output.startswith(f"raymaml: {path}:4: outer.num_steps is -5; it should be")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_file_of_another_system_is_read_and_its_lines_are_counted(
    line_end: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    text = "\ufeff" + CONFIG.replace("num_steps: 5", "num_steps: -5").replace("\n", line_end)
    path.write_bytes(text.encode())
    outcome = CliRunner().invoke(main, ["train", str(path)])
    assert outcome.exit_code == 2
    assert outcome.output.startswith(f"raymaml: {path}:4: outer.num_steps is -5; it should be")
