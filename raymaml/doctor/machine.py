"""One machine: devices, cores, memory, disks and limits.

The thresholds are judgements: what a cluster of one machine with two workers takes, and some.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from raymaml.doctor.finding import Finding, fail, in_units, ok, warn
from raymaml.doctor.limits import available_memory, cpu_limit, memory_limit
from raymaml.training.process import MALLOC_ENVIRONMENT

GIB = 1 << 30
LITTLE_MEMORY, HARDLY_ANY_MEMORY = 3 * GIB, 1 * GIB
"""Bytes: Ray's own processes take 0.7 GiB, a worker 0.5 to 1."""
LITTLE_DISK, HARDLY_ANY_DISK = 5 * GIB, GIB // 4
FEW_FILES, HARDLY_ANY_FILES = 4096, 256
STORE_SHARE = 0.3
"""Of the memory, what Ray takes for its object store."""
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that the path of a socket may have..."""
_LONGEST = (
    "/raymaml.123456/r/session_2026-01-01_00-00-00_000000_1234567/sockets/dash_TaskEventsHead"
)
"""...and what a Ray of raymaml's own puts behind its temporary folder."""
LONGEST_BASE = SOCKET_PATH - len(_LONGEST)
"""Bytes that the path of this temporary folder may have."""
_NO_CUDA = "install a torch built for CUDA, and check the driver with nvidia-smi"


def machine_findings(store: float | None = None) -> Iterator[Finding]:
    """Check this machine.

    Args:
        store: bytes of Ray's object store; None: it is still to be started.
    """
    total, available = available_memory()
    limit = memory_limit()
    has_driver = Path("/dev/nvidiactl").exists()
    yield device_finding(gpus(), has_driver=has_driver)
    yield cores_finding(os.cpu_count() or 1, len(_affinity()), cpu_limit())
    yield memory_finding(total, available, limit)
    needed = STORE_SHARE * min(total, limit or total) if store is None else store
    yield shared_memory_finding(Path("/dev/shm"), needed)
    temporary = ray_folder()
    yield disk_finding("disk for Ray", temporary)
    yield sockets_finding(temporary)
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))


def gpus() -> list[str]:
    """Return the GPUs that this process sees: name, memory, and whether torch has code for them."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        known = f"sm_{device.major}{device.minor}" in torch.cuda.get_arch_list()
        words = f"{device.name}, {in_units(device.total_memory)}, capability"
        words += f" {device.major}.{device.minor}"
        found.append(words + ("" if known else ", for which this torch has no code of its own"))
    return found


def device_finding(found: list[str], *, has_driver: bool) -> Finding:
    """Check that torch sees the GPUs that there are."""
    if any("no code of its own" in gpu for gpu in found):
        return warn("devices", "; ".join(found), "install a torch built for this GPU")
    if found:
        return ok("devices", "; ".join(found))
    if has_driver:
        return fail("devices", "an NVIDIA driver, but torch sees no GPU", _NO_CUDA)
    return ok("devices", f"no GPU; CPU of {torch.backends.cpu.get_cpu_capability()}")


def cores_finding(cores: int, allowed: int, quota: float | None) -> Finding:
    """Check that no more cores are counted than this process may use."""
    usable = min(allowed, quota or allowed)
    found = f"{cores} cores, of which {usable:g} may be used"
    if usable < cores:
        whole = max(1, int(usable))
        return warn("CPU", found, f"set cluster.num_workers to {whole}, or start Ray with so many")
    return ok("CPU", f"{cores} cores")


def memory_finding(total: int, available: int, limit: int | None) -> Finding:
    """Check the memory that is available, and the limit of a container."""
    found = f"{in_units(available)} available of {in_units(total)}"
    if limit is not None and limit < total:
        found += f", limited to {in_units(limit)}"
        available = min(available, limit)
    remedy = "end other programs, give the container more, or lower cluster.num_workers"
    return _by_amount("memory", found, available, (LITTLE_MEMORY, HARDLY_ANY_MEMORY), remedy)


def shared_memory_finding(folder: Path, store: float) -> Finding:
    """Check that Ray's object store, ``store`` bytes, fits into shared memory."""
    what = "shared memory"
    if not folder.is_dir():
        return ok(what, f"there is no {folder}: Ray keeps its objects in its temporary folder")
    if not os.access(folder, os.W_OK):
        return fail(what, f"{folder} is read-only", f"let this user write {folder}")
    size = shutil.disk_usage(folder).total
    found = f"{folder} has {in_units(size)}, Ray's object store {in_units(store)}"
    if size < store:
        return warn(
            what,
            f"{found}: it goes to a disk, which is slow",
            f"give it {in_units(store)}: docker run --shm-size=..., mount -o remount,size=...",
        )
    return ok(what, found)


def disk_finding(what: str, folder: Path) -> Finding:
    """Check that a folder, or the one it will be made in, can be written and has room."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        remedy = f"let this user write {there}, or give another folder"
        return fail(what, f"{folder} cannot be written ({error.strerror})", remedy)
    usage = shutil.disk_usage(there)
    found = f"{in_units(usage.free)} free of {in_units(usage.total)} for {folder}"
    return _by_amount(
        what, found, usage.free, (LITTLE_DISK, HARDLY_ANY_DISK), "make room, or give another folder"
    )


def sockets_finding(folder: Path) -> Finding:
    """Check that the paths of Ray's sockets are short enough for the kernel."""
    length = len(os.fsencode(folder.resolve())) + len(_LONGEST)
    found = f"paths of {length} bytes below {folder}; the kernel takes {SOCKET_PATH}"
    if length > SOCKET_PATH:
        remedy = "set RAY_TMPDIR to a folder with a short path: until then Ray's folder is in /tmp"
        return warn("sockets", found, remedy)
    return ok("sockets", found)


def open_files_finding(soft: int, hard: int) -> Finding:
    """Check how many files a process may have open."""
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    remedy = "raise the limit: ulimit -n 65536"
    if soft < hard != resource.RLIM_INFINITY:
        remedy += f" (up to {hard} without root)"
    found = f"at most {soft} a process"
    return _by_amount("open files", found, soft, (FEW_FILES, HARDLY_ANY_FILES), remedy)


def malloc_finding(what: str, environment: Mapping[str, str]) -> Finding:
    """Check that a worker keeps freed memory, as ``environment`` and the C library have it."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        remedy = "use a system with glibc for speed on CPU"
        return warn(what, "this C library gives freed memory back, page by page", remedy)
    missing = {k: v for k, v in MALLOC_ENVIRONMENT.items() if k not in environment}
    if missing:
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        remedy = f"start Ray on the nodes with {settings}: faster on CPU"
        return warn(what, "set by raymaml alone, when it has already begun", remedy)
    return ok(what, "freed memory is kept")


def ray_folder() -> Path:
    """Return the temporary folder in which Ray has its own."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def _affinity() -> set[int]:
    ask = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return set(range(os.cpu_count() or 1)) if ask is None else ask(0)


def _by_amount(
    what: str, found: str, amount: float, enough: tuple[float, float], remedy: str
) -> Finding:
    little, hardly_any = enough
    if amount < hardly_any:
        return fail(what, found, remedy)
    return warn(what, found, remedy) if amount < little else ok(what, found)
