"""Measuring one process from within: memory, and calls into ATen."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MIB = 1 << 20
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


class AtenCalls(TorchDispatchMode):
    """Counts the operators that reach the device, in either direction."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count, and go on."""
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Run ``work`` and return by how much memory rose at most meanwhile, MiB.

    On CUDA the memory of PyTorch's tensors; on Linux the resident memory of this process; elsewhere
    the growth of its peak over that before (none if it had already been as high), or None.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - held) / _MIB
    measure = _linux_peak if _reset_linux_peak() else _peak_of_life
    before = _linux_resident() if measure is _linux_peak else measure()
    work()
    after = measure()
    return None if before is None or after is None else max(after - before, 0.0)


def release(device: torch.device) -> None:
    """Give free memory back to the system, for others to use while this process waits."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def available_mib(device: torch.device) -> float | None:
    """Return how much memory Linux could give to processes, MiB; None where it is not asked.

    A GPU refuses what it has not, where Linux ends processes.
    """
    if device.type == "cuda":
        return None
    return _line_in_mib(Path("/proc/meminfo"), "MemAvailable")


def _reset_linux_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _linux_peak() -> float | None:
    return _line_in_mib(Path("/proc/self/status"), "VmHWM")


def _linux_resident() -> float | None:
    return _line_in_mib(Path("/proc/self/status"), "VmRSS")


def _line_in_mib(path: Path, key: str) -> float | None:
    """Read a line ``key:  123 kB``."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) / 1024 if values else None


def _peak_of_life() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)
