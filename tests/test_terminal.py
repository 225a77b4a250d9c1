"""Names that would command the terminal: none of them reaches it as it is."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_data import FOLDER_CONFIG, write_class_folders

from raymaml.common.logs import plain, plain_lines, set_up

EVIL = "a\x1b[31m\x1b]0;title\x07\nraymaml: all is well\r\x9b2J\u202egnp"
SHOWN = r"a\x1b[31m\x1b]0;title\x07\nraymaml: all is well\r\x9b2J\u202egnp"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_class_folders(tmp_path / "in", second=EVIL)
    path = tmp_path / "config.yaml"
    path.write_text(FOLDER_CONFIG.format(folder=tmp_path))
    return path


def on_a_terminal(*arguments: object) -> tuple[int, list[str]]:
    """Run a real command on a terminal; its exit code and the lines there."""
    ours, theirs = pty.openpty()
    script = "from raymaml.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "400"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            seen += data
    os.close(ours)
    return child.returncode, seen.decode().replace("\r\n", "\n").splitlines()


def harmless(lines: list[str]) -> bool:
    return not any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", line) for line in lines)


def test_names_of_classes_and_files_in_messages(config: Path) -> None:
    own = config.parent / "in" / "train" / f"{EVIL}train"
    (own / "0.png").write_bytes(b"x")
    (own / f"{EVIL}.png").write_bytes(b"y")
    code, lines = on_a_terminal("data", "import", config)
    assert code == 2
    assert harmless(lines)
    assert [line.partition(": is not a readable")[0] for line in lines] == [
        f"raymaml: {config.parent}/in/train/{SHOWN}train/{name}.png" for name in ("0", SHOWN)
    ]


def test_names_of_files_that_are_left_out(config: Path) -> None:
    own = config.parent / "in" / "train" / "atrain"
    (own / f"{EVIL}.heic").write_bytes(b"x")
    (own / os.fsdecode(b"\xff.heif")).write_bytes(b"x")
    code, lines = on_a_terminal("data", "import", config)
    assert code == 0
    assert harmless(lines)
    assert [line for line in lines if line.startswith("left out")] == [
        f"left out: 1 .heic files, which Pillow does not read, first train/atrain/{SHOWN}.heic",
        r"left out: 1 .heif files, which Pillow does not read, first train/atrain/\udcff.heif",
    ]
    assert len(lines) == 2 + 3 + 1  # the classes of each split, and the bank


def test_names_in_a_bank_of_somebody_else(config: Path) -> None:
    assert on_a_terminal("data", "import", config)[0] == 0
    card = config.parent / "bank" / "bank.json"
    header = json.loads(card.read_text())
    card.write_text(json.dumps(header | {"schema_version": EVIL}))
    code, lines = on_a_terminal("data", "sample", config)
    assert code == 2
    assert harmless(lines)
    assert len(lines) == 1


def test_characters_that_a_terminal_may_show() -> None:
    assert plain(EVIL) == SHOWN
    assert plain("Käfer 日本 👩‍🔬\t100%") == "Käfer 日本 👩‍🔬\t100%"
    assert plain("a\x85b\u2028c\u2066d\udcff") == r"a\x85b\u2028c\u2066d\udcff"
    assert plain_lines("a\x1b\nb\x07\n") == "a\\x1b\nb\\x07\n"


def test_messages_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    try:
        set_up(verbose=True)
        logging.getLogger("library").warning("read %s", EVIL)
    finally:
        root.handlers[:], root.level = before
        set_up(verbose=False)
    assert harmless(capsys.readouterr().err.splitlines())
