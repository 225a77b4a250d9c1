"""The memory that this machine, or its container, has."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import psutil
import torch

GROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20
TAPE_SHARE, TAPE_SHARE_OF_GPU = 0.25, 0.5
"""Shares of free memory that the activations kept by all processes of a machine, or by that of a
GPU, may take. The episodes at once on a GPU are as many as fit with all of theirs."""


def memory_limit(groups: Path = GROUPS) -> float:
    """Return the bytes that a container may have: control groups of Linux, version 2 or 1."""
    files = (groups / "memory.max", groups / "memory" / "memory.limit_in_bytes")
    texts = [file.read_text(encoding="ascii").strip() for file in files if file.is_file()]
    return min((int(text) for text in texts if text.isdecimal()), default=math.inf)  # "max"


def memory() -> tuple[float, float]:
    """Return the bytes that are available, and those of the machine or container."""
    found = psutil.virtual_memory()
    total = min(found.total, memory_limit())
    return min(found.available, total), total


@cache
def tape_budget(device: torch.device) -> float:
    """Return the bytes that the activations of a process may take on a device; asked once.

    On CPU there is a process for each core.
    """
    if device.type == "cuda":
        return TAPE_SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]
    return TAPE_SHARE * memory()[0] / (psutil.cpu_count() or 1)
