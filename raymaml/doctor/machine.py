"""One machine: versions, devices, memory and disks.

The bounds are judgements: the needs of a cluster of one machine with two workers, and some more.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

import raymaml
from raymaml.common.errors import Mistake, UserError
from raymaml.common.memory import memory
from raymaml.doctor import Finding, attempt
from raymaml.kernels.library import Kernels, usable

GIB = 2.0**30
ENOUGH_MEMORY = (1 * GIB, 3 * GIB)
"""Bytes, to run at all and to run well: Ray's processes take 0.7 GiB, a worker 0.5 to 1."""
ENOUGH_DISK = (0.25 * GIB, 5 * GIB)


def own_versions() -> dict[str, str]:
    """Return the versions that all nodes must have alike."""
    own = {"python": platform.python_version(), "raymaml": raymaml.__version__}
    names = ("torch", "torchvision", "ray", "numpy", "pyarrow")
    return own | {name: metadata.version(name) for name in names}


def unmet_requirements(package: str) -> Iterator[Mistake]:
    """Yield a mistake for each requirement of a package that is not met."""
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name, allowed = requirement.name, requirement.specifier
            if not allowed.contains(version := metadata.version(name), prereleases=True):
                problem = f"{name} is {version}, but {package} requires {allowed}"
                yield Mistake(problem, f"pip install '{name}{allowed}'")


def machine_findings() -> Iterator[Finding]:
    """Check versions, devices, memory and Ray's disk of the machine of this process."""
    yield from attempt({"versions": _versions, "devices": _devices})
    yield kernels_finding()
    available, total = memory()
    remedy = "end other programs, give the container more, or lower cluster.num_workers"
    yield amount_finding("memory", available, total, ENOUGH_MEMORY, remedy)
    yield disk_finding("disk for Ray", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))


def _versions() -> str:
    unmet = list(unmet_requirements("torchvision"))  # each version needs one version of torch
    if raymaml.__version__ != "0+unknown":  # it is installed
        unmet += unmet_requirements("raymaml")
    if unmet:
        raise UserError(*unmet)
    return ", ".join(f"{name} {version}" for name, version in own_versions().items())


def _devices() -> str:
    """Return the GPUs that torch sees. Only the rehearsal computes on them."""
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    found = [f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB" for gpu in gpus]
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not found and not is_hidden and Path("/dev/nvidiactl").exists():
        raise UserError(
            "an NVIDIA driver, but torch sees no GPU",
            remedy="install a torch built for CUDA, and check the driver with nvidia-smi",
        )
    return "; ".join(found) or f"no GPU; CPU of {torch.backends.cpu.get_cpu_capability()}"


def kernels_finding() -> Finding:
    """Check that the kernels can be built, or are there."""
    found = usable(torch.float32)
    if isinstance(found, Kernels):
        return Finding("ok", "kernels", f"for {torch.backends.cpu.get_cpu_capability()}")
    remedy = "install g++ or clang++; without them ConvNet4 takes 2 to 3 times as long on CPU"
    return Finding("warn", "kernels", f"none: {found}", remedy)


def disk_finding(what: str, folder: Path) -> Finding:
    """Check the room for a folder, which need not exist yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    usage = psutil.disk_usage(str(there))
    remedy = f"make room in {there}, or give another folder"
    return amount_finding(what, usage.free, usage.total, ENOUGH_DISK, remedy)


def shared_memory_finding(folder: Path, store: float) -> Finding:
    """Check that Ray's object store, of ``store`` bytes, fits into shared memory."""
    total = psutil.disk_usage(str(folder)).total if folder.exists() else store  # Linux alone has it
    remedy = "give it more: docker run --shm-size=..., mount -o remount,size=... /dev/shm"
    what = f"shared memory (object store of {store / GIB:.1f} GiB)"
    return amount_finding(what, total, total, (0, store), remedy)


def amount_finding(
    what: str, free: float, total: float, enough: tuple[float, float], remedy: str
) -> Finding:
    """Judge an amount in bytes: a failure below the first bound, a warning below the second."""
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= enough[1]:
        return Finding("ok", what, found)
    return Finding("fail" if free < enough[0] else "warn", what, found, remedy)
