"""Real disks that are full, too small or read-only: one message, nothing torn, the run goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_faults import bits, command, copied, quiet, stands_whole

from raymaml.common.errors import StorageError, storage_error
from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_test import plan_test
from raymaml.storage.files import new_folder, replacing
from raymaml.training.checkpoint import list_steps
from raymaml.training.metrics import RunMetrics, read_metrics
from raymaml.training.state import Validation
from raymaml.training.worker import train_locally

MESSAGE = re.compile(
    r"(\S+): cannot be read or written \((.*)\); (.*), then run the same command: it goes on from"
    r" all that is whole"
)
ROOM = re.compile(r"No space left on device, ([\d,]+) bytes are free in (\S+) and more than")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own, which needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs needs the right to mount; the tests of file size limits do not")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Write a file that leaves so many bytes free, in whole pages."""
    space = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(space.f_bavail * space.f_bsize - leave))
    return filler


def problem_of(error: StorageError) -> re.Match[str]:
    (problem,) = error.problems
    found = MESSAGE.fullmatch(problem)
    assert found, problem
    return found


@pytest.mark.fault("disk full: checkpoint")
def test_a_checkpoint_on_a_full_disk(disk, make_config):
    # steps 3 and 6 keep a checkpoint of 3 files, about 40 KiB; 24 KiB are free when it is due
    config = make_config("run", f"run_dir={disk}", "outer.num_steps=9")
    lone = make_config("run", "name=lone", "outer.num_steps=9")
    assert train_locally(lone, quiet)

    def fill_up(line: str) -> None:
        if line.startswith("step 5/9") and not (disk / "filler").exists():
            fill(disk, leave=24 << 10)

    with pytest.raises(StorageError) as caught:
        train_locally(config, fill_up)

    found = problem_of(caught.value)
    assert found[1] == str(config.run_folder / "checkpoint_00000006")
    room = ROOM.match(found[2])
    assert room
    assert int(room[1].replace(",", "")) <= 24 << 10
    assert found[3] == "make room there"
    assert list_steps(config.run_folder)[-1] == 3
    stands_whole(config.run_folder)

    (disk / "filler").unlink()
    assert train_locally(config, quiet)
    assert bits(config.run_folder) == bits(lone.run_folder)


@pytest.mark.fault("disk full: metrics")
def test_metrics_on_a_full_disk(disk, make_config):
    config = make_config(
        "run", f"run_dir={disk}", "outer.num_steps=400", "outer.validate_every=400"
    )

    def fill_up(line: str) -> None:
        if line.startswith("step   5/"):
            fill(disk)

    with pytest.raises(StorageError) as caught:
        train_locally(config, fill_up)

    # a row is about 180 bytes, so the page that the file ends in takes some more of them; the
    # events of TensorBoard, which are as many bytes, end in a page of their own
    found = problem_of(caught.value)
    names = {str(config.run_folder / name) for name in ("metrics.jsonl", "tensorboard")}
    assert found[1] in names
    assert ROOM.match(found[2])
    assert list_steps(config.run_folder) == [0]
    stands_whole(config.run_folder)

    (disk / "filler").unlink()
    whole = make_config("run", f"run_dir={disk}", "outer.num_steps=8", "outer.validate_every=400")
    assert train_locally(whole, quiet)
    rows = read_metrics(whole.run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "query_loss" in row] == list(range(1, 9))


@pytest.mark.fault("disk full: records")
def test_records_on_a_full_disk(disk, make_config):
    config = make_config("run", f"run_dir={disk}", "outer.num_steps=1")
    assert train_locally(config, quiet)
    lone = copied(config, "lone", disk.parent)
    plan = lambda device: plan_test(config, device)  # noqa: E731
    filler = fill(disk)

    with pytest.raises(StorageError) as caught:
        judge_locally(plan, config.cluster, quiet)

    found = problem_of(caught.value)
    assert str(config.run_folder / "test") in found[1]
    assert ROOM.match(found[2])
    assert list(config.run_folder.glob("test/*/*/*.parquet")) == []
    stands_whole(config.run_folder)

    filler.unlink()
    judge_locally(plan, config.cluster, quiet)
    judge_locally(lambda device: plan_test(lone, device), config.cluster, quiet)
    found = config.run_folder.glob("test/*/*/*.parquet")
    names = [path.relative_to(config.run_folder) for path in found]
    assert len(names) == 3 + 2 + 2  # chunks of 4: 10 episodes, and 5 of each baseline
    assert all((lone.run_folder / name).is_file() for name in names)


@pytest.mark.fault("storage fails")
def test_a_limit_on_the_size_of_files_is_one_message_of_the_command(make_config, tmp_path):
    """What an unprivileged user can have: a limit of 20 kB, below the 22 kB of optimizer.pt."""
    make_config("run", "model.width=8")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({20_000}, -1))"
    run = f"{limit}; from raymaml.cli import main; main()"
    arguments = ["train", str(tmp_path / "run/config.yaml"), "--local"]

    ended = subprocess.run(
        [sys.executable, "-c", run, *arguments], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    found = MESSAGE.fullmatch(line.removeprefix("raymaml: "))
    assert found, line
    assert found[1].endswith("runs/tiny/checkpoint_00000003")
    assert (found[2], found[3]) == (
        "File too large",
        "raise the limit on the size of a file (`ulimit -f`)",
    )
    assert list_steps(tmp_path / "run/runs/tiny") == [0]
    assert command("train", *arguments[1:]).returncode == 0


@pytest.mark.fault("storage fails")
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room within the quota"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "give this user the right to"),
        (errno.EIO, "the device, or the network behind it, fails"),
        (errno.ESTALE, "the device, or the network behind it, fails"),
        (errno.EMFILE, "raise the limit on open files"),
    ],
)
def test_what_storage_refuses_has_a_remedy(tmp_path, code, remedy):
    for writing in (partial(new_folder, marker="marker.json"), replacing):
        with pytest.raises(StorageError) as caught, writing(tmp_path / "it"):
            raise OSError(code, os.strerror(code))
        found = problem_of(caught.value)
        assert found[1] == str(tmp_path / "it")
        assert found[2].startswith(os.strerror(code))
        assert found[3].startswith(remedy)
        assert ("bytes are free" in found[2]) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_left_alone(tmp_path):
    assert storage_error(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
    with pytest.raises(ValueError, match="of the block"), new_folder(tmp_path / "it", "m"):
        raise ValueError("of the block")


@pytest.mark.fault("storage fails")
def test_event_files_that_cannot_be_written_do_not_hold_the_run_up(tmp_path, make_config):
    """tensorboardX's own thread would die of it, and the twelfth value would wait for ever."""
    metrics = RunMetrics(tmp_path, make_config().outer, quiet)
    metrics.start(0)
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    judged = Validation(step=0, accuracy=0.5, ci95=0.1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (event_file.stat().st_size, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            metrics.validation(judged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem_of(caught.value)[1] == str(tmp_path / "tensorboard")
    metrics.validation(judged)  # and with room it goes on


def test_a_checkpoint_file_is_the_same_whatever_it_was_written_through(tmp_path, make_config):
    """Weights have one hash: records are found by it, whoever wrote the checkpoint."""
    config = make_config("one", "outer.num_steps=1")
    other = make_config("two", "outer.num_steps=1")
    for each in (config, other):
        assert train_locally(each, quiet)
    files = [each.run_folder / "checkpoint_00000001" / "params.pt" for each in (config, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.load(files[0], weights_only=True)
