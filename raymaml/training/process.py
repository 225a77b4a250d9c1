"""Settings of a process that learns or judges."""

from __future__ import annotations

import ctypes
import sys

import torch

from raymaml.config.schema import ClusterConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = 1 << 30


def prepare_process(cluster: ClusterConfig, device: torch.device) -> None:
    """Set the number of threads, and keep freed memory, of a process that computes on CPU.

    glibc returns large blocks to the kernel at each free and pays a page fault for each page at the
    next allocation: more than the arithmetic of small images. Above these thresholds it does not.
    Other C libraries are left as they are.
    """
    if device.type != "cpu":
        return
    torch.set_num_threads(cluster.threads_per_worker)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEEP)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
