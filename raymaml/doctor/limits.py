"""What the kernel lets this process have: Linux' control groups, of either version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes that the control group of this process may have; None: no limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    texts = (text for folder in _folders(root, "memory") for text in _read(folder, names))
    sizes = [int(text) for text in texts if text.isdecimal()]
    return min((size for size in sizes if size < 2**60), default=None)  # 2**63: none


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return the CPU cores that the control group of this process may use; None: no limit."""
    found: list[float] = []
    for folder in _folders(root, "cpu"):
        parts = " ".join(
            _read(folder, ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
        ).split()
        if len(parts) == 2 and all(part.isdecimal() for part in parts):  # "max" and -1: no limit
            found.append(int(parts[0]) / int(parts[1]))
    return min(found, default=None)


def available_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return the bytes of memory that the machine has, and that are available now."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    sizes = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines)}
    return sizes["MemTotal"], sizes["MemAvailable"]


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of this process's control group and those above it, of each version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and controller)
        group = Path(path.lstrip("/"))
        # in a container the path may be one of the host's, and the top folder is what there is
        yield from (top / folder for folder in (group, *group.parents))


def _read(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (folder / name).is_file():
            yield (folder / name).read_text(encoding="ascii").strip()
