"""Real disks that are full, too small or read-only: one message, nothing torn, the run goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
from helpers_faults import bits, command, quiet, stands_whole

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


def fill(folder: Path, leave: int = 0) -> None:
    """Write a file that leaves ``leave`` bytes free, in whole pages."""
    space = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(space.f_bavail * space.f_bsize - leave))


def problem_of(error: StorageError) -> re.Match[str]:
    (problem,) = error.problems
    found = MESSAGE.fullmatch(problem)
    assert found, problem
    return found


@pytest.mark.fault("disk full: metrics")
@pytest.mark.fault("disk full: checkpoint")
@pytest.mark.fault("disk full: records")
def test_a_run_and_its_campaign_on_a_full_disk(disk, make_config):
    """A run of 80 steps is cut off in its metrics, then in a checkpoint, and its campaign."""
    steps = ("outer.num_steps=80", "outer.validate_every=40")
    config = make_config("run", f"run_dir={disk}", *steps)
    lone = make_config("run", "name=lone", *steps)
    folder, filler = config.run_folder, disk / "filler"
    plan, plan_lone = (lambda device, run=run: plan_test(run, device) for run in (config, lone))
    assert train_locally(lone, quiet)
    judge_locally(plan_lone, lone.cluster, quiet)

    def refused(work: Callable[[], object], last_step: int) -> str:
        """Return what cannot be written: all else stands whole, and then there is room again."""
        with pytest.raises(StorageError) as caught:
            work()
        found = problem_of(caught.value)
        room = ROOM.match(found[2])
        assert room
        assert int(room[1].replace(",", "")) <= 24 << 10
        assert found[3] == "make room there"
        assert list_steps(folder)[-1] == last_step
        stands_whole(folder)
        filler.unlink()
        return found[1]

    def train_until(step: int, leave: int) -> None:
        def fill_up(line: str) -> None:
            if line.startswith(f"step {step:2}/80"):
                fill(disk, leave)

        train_locally(config, fill_up)

    # a row is about 180 bytes, so the page that the file ends in takes some more of them; the
    # events of TensorBoard, which are as many bytes, end in a page of their own
    written = refused(lambda: train_until(5, leave=0), last_step=0)
    assert written in {str(folder / name) for name in ("metrics.jsonl", "tensorboard")}
    # a checkpoint is 3 files, about 40 KiB
    written = refused(lambda: train_until(39, leave=24 << 10), last_step=0)
    assert written == str(folder / "checkpoint_00000040")
    assert train_locally(config, quiet)
    assert bits(folder) == bits(lone.run_folder)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "query_loss" in row] == list(range(1, 81))

    fill(disk)
    written = refused(lambda: judge_locally(plan, config.cluster, quiet), last_step=80)
    assert str(folder / "test") in written
    assert list(folder.glob("test/*/*/*.parquet")) == []
    judge_locally(plan, config.cluster, quiet)
    names = [path.relative_to(folder) for path in folder.glob("test/*/*/*.parquet")]
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
    files = [
        each.run_folder / "checkpoint_00000001" / "params.safetensors" for each in (config, other)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert safetensors.torch.load_file(files[0])
