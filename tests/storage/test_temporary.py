"""The next process removes the remains of killed ones, and nothing that living ones hold."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers_data import FOLDER_CONFIG, make_bank, spec_of, write_class_folders

from raymaml.data.shards import Sampling
from raymaml.doctor.rehearsal import rehearsal_folder
from raymaml.storage import temporary as module
from raymaml.storage.cache import local_copy
from raymaml.storage.files import new_folder
from raymaml.storage.place import to_place
from raymaml.storage.temporary import own_folder, temporary_folder, this_machine

_KILLED = """
import os, sys
from raymaml.cli import main
from raymaml.data import shards
from raymaml.data.importers.plan import PlannedClass
def die(*_):
    os.kill(os.getpid(), 9)
PlannedClass.parts = die
shards.sample_episode = die
main(sys.argv[1:])
"""
_HOLDS = """
import sys
from pathlib import Path
from raymaml.storage.temporary import own_folder
with own_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def of_the_dead(folder: Path, name: str) -> Path:
    """Return the place of a folder that a killed process of this machine has left."""
    return folder / f"{name}-{this_machine()}0123dead"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_class_folders(tmp_path / "in")
    path = tmp_path / "config.yaml"
    path.write_text(FOLDER_CONFIG.format(folder=tmp_path))
    return path


def run(*arguments: object, script: str = "from raymaml.cli import main; main()") -> int:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_killed_imports_and_samplings_leave_nothing_for_ever(config: Path) -> None:
    place = config.parent
    assert run("data", "import", config, script=_KILLED) == -signal.SIGKILL
    assert len(list(place.glob(".bank.partial-*"))) == 1
    assert run("data", "import", config) == 0
    assert sorted(path.name for path in place.iterdir()) == ["bank", "config.yaml", "in"]
    assert run("data", "sample", config, script=_KILLED) == -signal.SIGKILL
    assert len(list((place / "shards").glob(".train.partial-*"))) == 1
    assert run("data", "sample", config) == 0
    assert sorted(path.name for path in (place / "shards").iterdir()) == ["test", "train", "val"]


def test_what_a_living_writer_or_another_name_holds_is_left_alone(tmp_path: Path) -> None:
    """Names such as ``a[1]`` are no patterns; links and files stay."""
    dead, other = (of_the_dead(tmp_path, name) for name in (".a[1].partial", ".a1.partial"))
    link, file = (dead.with_name(dead.name[:-4] + end) for end in ("0001", "0002"))
    for folder in (dead, other):
        (folder / "deep").mkdir(parents=True)
    link.symlink_to(other)
    file.write_text("x")
    command = [sys.executable, "-c", _HOLDS, tmp_path, ".a[1].partial"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        living = Path(child.stdout.readline().decode().strip())
        assert not dead.exists()
        dead.mkdir()
        with new_folder(tmp_path / "a[1]", "marker") as partial:
            (partial / "marker").write_text("x")
            with own_folder(tmp_path, ".a[1].partial") as mine:
                assert partial.is_dir()
        assert not dead.exists()
        assert not mine.exists()
        assert all(path.exists() for path in (living, other, link, file))
        assert (tmp_path / "a[1]" / "marker").read_text() == "x"
        child.kill()


def test_shards_that_are_there_do_not_keep_what_a_kill_left(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", {"train": [4, 4]})
    for _ in range(2):
        Sampling(
            bank, spec_of(2, 1, 1, 2), seed=0, split="train", folder=tmp_path / "s" / "t"
        ).write()
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["t"]
        of_the_dead(tmp_path / "s", ".t.partial").mkdir()


def test_folders_of_other_machines_and_older_versions_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may be shared: a lock that is held on another machine does not show on this one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = this_machine()
    names = (".t.partial", "raymaml-temporary", "raymaml-doctor")
    for name in names:
        of_the_dead(tmp_path, name).mkdir()
        for ending in ("0123abcd", f"{own}0123abcd-cache", f"{int(own, 16) ^ 1:08x}0123abcd"):
            (tmp_path / f"{name}-{ending}").mkdir()
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another")
        assert this_machine() != own
    bank = make_bank(tmp_path / "bank", {"train": [4, 4]})
    Sampling(bank, spec_of(2, 1, 1, 2), seed=0, split="train", folder=tmp_path / "t").write()
    place = to_place("memory://temporary/machines")
    (place / "marker").write_text("machines")
    local_copy(place, tmp_path, marker="marker", others=lambda _: [], verify=lambda _: None)
    with rehearsal_folder(None), temporary_folder():
        pass
    assert before - set(tmp_path.iterdir()) == {of_the_dead(tmp_path, name) for name in names}


def test_temporary_folders_are_for_their_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0o022)
    try:
        with temporary_folder() as folder, own_folder(tmp_path / "a", ".x.partial") as partial:
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, partial)]
    finally:
        os.umask(before)
    assert modes == [0o700, 0o755]  # a folder to be renamed is as the user asks for: 0o777 & ~0o022


def test_a_folder_that_goes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take it for a dead one's."""
    held, taken = module.held, list[Path]()

    def after_another(folder: Path) -> AbstractContextManager[None]:
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return held(folder)

    monkeypatch.setattr(module, "held", after_another)
    with own_folder(tmp_path, "x") as folder:
        assert taken == [folder]
        assert folder.is_dir()
