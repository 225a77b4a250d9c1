"""One machine, by what it has where that can be had, and by numbers elsewhere."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from raymaml.doctor.limits import available_memory, cpu_limit, memory_limit
from raymaml.doctor.machine import (
    GIB,
    cores_finding,
    device_finding,
    disk_finding,
    machine_findings,
    malloc_finding,
    memory_finding,
    open_files_finding,
    shared_memory_finding,
    sockets_finding,
)
from raymaml.training.process import MALLOC_ENVIRONMENT

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """``mount("size=1m")`` makes a file system in memory, where that is allowed."""
    with ExitStack() as mounted:

        def make(options: str) -> Path:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("mounting needs root, and a container that allows it")
            mounted.callback(subprocess.run, ["umount", str(folder)], check=True)
            return folder

        yield make


def test_all_is_looked_at() -> None:
    whats = [finding.what for finding in machine_findings()]
    assert whats == [
        *("devices", "CPU", "memory", "shared memory", "disk for Ray", "sockets", "open files")
    ]


def test_a_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    finding = disk_finding("disk", tmp_path / "a" / "b")
    assert finding.status in {"ok", "warn"}  # as much as this machine has
    assert f"for {tmp_path / 'a' / 'b'}" in finding.found
    assert not (tmp_path / "a").exists()


def test_a_small_disk(mount: Mount) -> None:
    assert disk_finding("disk", mount("size=6g")).status == "ok"
    assert disk_finding("disk", mount("size=1g")).status == "warn"
    finding = disk_finding("disk", mount("size=1m"))
    assert finding.status == "fail"
    assert finding.found.startswith("1 MiB free of 1 MiB")
    assert finding.remedy == "make room, or give another folder"


def test_a_read_only_disk(mount: Mount) -> None:
    folder = mount("ro")
    finding = disk_finding("disk", folder)
    assert finding.status == "fail"
    assert "cannot be written (Read-only file system)" in finding.found
    assert str(folder) in finding.remedy


def test_shared_memory(mount: Mount) -> None:
    small = mount("size=64m")  # what docker gives
    assert shared_memory_finding(small, 60 << 20).status == "ok"
    finding = shared_memory_finding(small, 2 * GIB)
    assert finding.status == "warn"
    assert "has 64 MiB, Ray's object store 2.0 GiB" in finding.found
    assert "--shm-size" in finding.remedy
    assert shared_memory_finding(small / "none", GIB).status == "ok"


def test_sockets(tmp_path: Path) -> None:
    assert sockets_finding(Path("/tmp")).status == "ok"
    # 5 bytes and 15 more, 20, leave 87 for what Ray adds: it adds 15 + 2 + 43 + 28 = 88
    assert sockets_finding(Path("/tmp") / ("x" * 14)).status == "ok"
    finding = sockets_finding(Path("/tmp") / ("x" * 15))
    assert finding.status == "warn"
    assert "RAY_TMPDIR" in finding.remedy


def test_open_files() -> None:
    assert open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE)).what == "open files"
    assert open_files_finding(65536, 65536).status == "ok"
    assert open_files_finding(resource.RLIM_INFINITY, resource.RLIM_INFINITY).status == "ok"
    finding = open_files_finding(1024, 4096)
    assert (finding.status, finding.found) == ("warn", "at most 1024 a process")
    assert finding.remedy == "raise the limit: ulimit -n 65536 (up to 4096 without root)"
    assert open_files_finding(64, 64).status == "fail"


def test_memory() -> None:
    assert memory_finding(16 * GIB, 8 * GIB, None).status == "ok"
    assert memory_finding(16 * GIB, 2 * GIB, None).status == "warn"
    assert memory_finding(16 * GIB, GIB // 2, None).status == "fail"
    limited = memory_finding(64 * GIB, 32 * GIB, GIB // 2)
    assert limited.status == "fail"
    assert limited.found == "32.0 GiB available of 64.0 GiB, limited to 512 MiB"
    assert memory_finding(64 * GIB, 32 * GIB, 64 * GIB).status == "ok"


def test_cores() -> None:
    assert cores_finding(4, 4, None).status == "ok"
    for finding in (cores_finding(64, 2, None), cores_finding(64, 64, 2.5)):
        assert finding.status == "warn"
        assert finding.remedy.startswith("set cluster.num_workers to 2,")


def test_devices() -> None:
    assert device_finding([], has_driver=False).status == "ok"
    assert device_finding(["H100, 80.0 GiB, capability 9.0"], has_driver=True).status == "ok"
    unseen = device_finding([], has_driver=True)
    assert unseen.status == "fail"
    assert "torch built for CUDA" in unseen.remedy
    old = ["K80, 12.0 GiB, capability 3.7, for which this torch has no code of its own"]
    assert device_finding(old, has_driver=True).status == "warn"


def test_malloc() -> None:
    assert malloc_finding("malloc", MALLOC_ENVIRONMENT).status == "ok"
    finding = malloc_finding("malloc", {"MALLOC_ARENA_MAX": "1"})
    assert finding.status == "warn"
    assert "MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824" in finding.remedy
    assert "ARENA" not in finding.remedy


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


def test_control_groups_of_the_second_version(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "1073741824\n",
            "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "max 100000\n",
        },
    )
    assert memory_limit(root) == GIB
    assert cpu_limit(root) == 1.5


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            # in the container the path is another one: the top folder is what there is
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_limit(root) == GIB // 2
    assert cpu_limit(root) is None
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    write(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n"})
    assert memory_limit(root) is None
    assert cpu_limit(root) == 0.5


def test_no_control_groups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    assert cpu_limit(tmp_path) is None
    total, available = available_memory()
    assert 0 < available <= total


def test_a_limit_that_the_kernel_sets() -> None:
    """A process in a group of 512 MiB sees that limit."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    top, file = (first, "memory.limit_in_bytes") if first.is_dir() else (second, "memory.max")
    group = top / f"raymaml-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("making a control group needs root, and a container that allows it")
    code = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));"
        "from raymaml.doctor.limits import memory_limit; print(memory_limit())"
    )
    try:
        if not (group / file).exists():
            pytest.skip("control groups here do not limit memory")
        (group / file).write_text(str(512 << 20))
        command = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{512 << 20}\n"
    finally:
        group.rmdir()
