"""What killed processes leave is removed by the next one, and what living ones hold is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_data import make_bank, spec_of
from PIL import Image

from raymaml.data.cache import Copying, local_copy
from raymaml.data.episodes import write_shards
from raymaml.data.files import new_folder, on_disk
from raymaml.data.temporary import own_folder, temporary_folder
from raymaml.places import to_place

CONFIG = """name: x
data:
  source: {{kind: image-folder, path: {folder}/in}}
  bank: {folder}/bank
  shards: {folder}/shards
  image_size: 8
episodes:
  train: &spec {{num_ways: 2, num_shots: 1, num_queries: 1, num_episodes: 2}}
  val: *spec
  test: *spec
outer: {{num_steps: 1}}
"""
_KILLED = """
import os, sys
from raymaml.cli import main
from raymaml.data import episodes
from raymaml.data.importers.plan import PlannedClass
def die(*_):
    os.kill(os.getpid(), 9)
PlannedClass.parts = die
episodes._Sampling.table = die
main(sys.argv[1:])
"""
_HOLDS = """
import sys
from pathlib import Path
from raymaml.data.temporary import own_folder
with own_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for split in ("train", "val", "test"):
        for name in "ab":
            for image in range(2):
                path = tmp_path / "in" / split / f"{split}-{name}" / f"{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8)).save(path)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def run(*arguments: object, script: str = "from raymaml.cli import main; main()") -> int:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_killed_imports_and_samplings_leave_nothing_for_ever(config: Path) -> None:
    place = config.parent
    for _ in range(2):
        assert run("data", "import", config, script=_KILLED) == -signal.SIGKILL
        assert len(list(place.glob(".bank.partial-*"))) == 1  # of this one alone
    assert run("data", "import", config) == 0
    assert sorted(path.name for path in place.iterdir()) == ["bank", "config.yaml", "in"]
    for _ in range(2):
        assert run("data", "sample", config, script=_KILLED) == -signal.SIGKILL
        assert len(list((place / "shards").glob(".train.partial-*"))) == 1
    assert run("data", "sample", config) == 0
    assert sorted(path.name for path in (place / "shards").iterdir()) == ["test", "train", "val"]


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Path]:
    """The folder ``.x.partial-...`` of another process, which is alive during the test."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, tmp_path, ".x.partial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        yield Path(child.stdout.readline().strip())
        child.kill()


def test_a_living_writer_is_left_alone(living: Path, tmp_path: Path) -> None:
    dead = tmp_path / ".x.partial-dead"
    other = tmp_path / ".y.partial-dead"
    link, file = tmp_path / ".x.partial-link", tmp_path / ".x.partial-file"
    for folder in (dead, other):
        (folder / "deep").mkdir(parents=True)
    link.symlink_to(other)
    file.write_text("x")
    with new_folder(tmp_path / "x", "marker") as partial:
        (partial / "marker").write_text("x")
        with own_folder(tmp_path, ".x.partial") as mine:
            assert partial.is_dir()
    assert not dead.exists()
    assert not mine.exists()
    assert living.is_dir()
    assert other.is_dir()  # of another name
    assert link.is_symlink()
    assert file.exists()
    assert (tmp_path / "x" / "marker").read_text() == "x"


def test_names_are_no_patterns(tmp_path: Path) -> None:
    other = tmp_path / ".a1.partial-dead"
    other.mkdir()
    with own_folder(tmp_path, ".a[1].partial") as folder:
        dead = folder.with_name(".a[1].partial-dead")
        dead.mkdir()
    with own_folder(tmp_path, ".a[1].partial"):
        assert not dead.exists()
    assert other.is_dir()


def test_shards_that_are_there_do_not_keep_what_a_kill_left(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", {"train": [4, 4]})
    for _ in range(2):
        write_shards(bank, spec_of(2, 1, 1, 2), seed=0, split="train", folder=tmp_path / "s" / "t")
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["t"]
        (tmp_path / "s" / ".t.partial-dead").mkdir(exist_ok=True)
    write_shards(bank, spec_of(2, 1, 1, 2), seed=0, split="train", folder=tmp_path / "s" / "t")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["t"]


def test_copies_of_the_cache(living: Path, tmp_path: Path) -> None:
    """Copies of what is no more at its place would never be made again."""
    dead = tmp_path / ".0123abcd.partial-dead"
    dead.mkdir()
    place = to_place("memory://temporary/bank")
    (place / "marker").write_text("x")
    how = Copying(marker="marker", others=lambda _: [], verify=lambda _: None)
    copy = local_copy(place, tmp_path, how)
    assert (copy / "marker").read_text() == "x"
    assert not dead.exists()
    assert living.is_dir()


def test_what_goes_to_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for number in range(2):
        (tmp_path / f"raymaml-temporary-{number}").mkdir()
    with on_disk(to_place("memory://temporary/report")) as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        with temporary_folder() as other:
            assert folder.is_dir()
            assert other.is_dir()
    assert list(tmp_path.iterdir()) == []
