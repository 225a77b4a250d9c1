"""Settings of a process that learns or judges."""

from __future__ import annotations

import ctypes
import sys

import torch

from raymaml.config.schema import ClusterConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEEP = 1 << 30
MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(_KEEP),
    "MALLOC_MMAP_THRESHOLD_": str(_KEEP),
    "MALLOC_ARENA_MAX": "1",
}
"""The same settings for a process that is yet to start: a worker of Ray has many threads, each with
a heap of its own, before our code runs in it."""


def prepare_process(cluster: ClusterConfig, device: torch.device) -> None:
    """Set precision of a process on a GPU; threads, and to keep freed memory, of one on CPU.

    glibc returns large blocks to the kernel at each free and pays a page fault for each page at the
    next allocation: more than the arithmetic of small images. Below these thresholds it does not,
    provided that all threads share one heap: those of other threads are at most 64 MB each, and
    shrink. Other C libraries are left as they are.
    """
    if device.type != "cpu":
        set_precision(cluster)
        return
    torch.set_num_threads(cluster.threads_per_worker)
    if sys.platform == "linux" and cluster.keep_freed_memory:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEEP)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
            mallopt(_M_ARENA_MAX, 1)


def set_precision(cluster: ClusterConfig) -> None:
    """Let GPUs multiply in TF32 where the configuration says so, and else in float32."""
    torch.backends.cuda.matmul.allow_tf32 = cluster.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = cluster.precision == "tf32"
