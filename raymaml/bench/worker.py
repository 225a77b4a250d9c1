"""A process of a contender: it measures memory, operators and seconds from within."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raymaml.bench.contenders import PHASES, Contender, standard
from raymaml.bench.report import Row
from raymaml.config.schema import Config
from raymaml.training.graphs import record_on_gpu
from raymaml.training.settings import local_device, prepare_process

Detail = Literal["speed", "memory", "results"]
Results = list[NDArray[Any]]
"""The meta-gradient, [P], or the logits, [N*Q * N], in float32 and in float64."""
_task: tuple[Barrier, Row, Config] | None = None
"""What this process measures, and where all that are timed at the same time wait for each other."""


def prepare(together: Barrier, row: Row, config: Config) -> None:
    """Prepare a process.

    On the CPUs of Linux PyTorch then refuses more memory than the machine has.
    """
    global _task  # noqa: PLW0603 - set once, when the process starts
    _task = together, row, config
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    # PyTorch's timer loads this, which warns of CUDA without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if sys.platform == "linux" and local_device(config.cluster).type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def measure(episodes: int, detail: Detail) -> tuple[Row, Results]:
    """Fill in the speed of the row, and its memory and operators if ``detail`` asks for them.

    raymaml gets the settings of its training processes, others the defaults. Ask for the memory
    first: later calls miss the memory that the process keeps.
    """
    from torch.utils.benchmark import Timer

    assert _task is not None
    together, row, config = _task
    device = local_device(config.cluster)
    torch.set_num_threads(row.threads)
    if row.library == "raymaml":
        prepare_process(config.cluster, device)
    build = partial(Contender, row.library, row.method, device=device, at_once=row.at_once)
    try:
        for phase in PHASES:  # libraries load parts of themselves at the first use
            build(config=standard("smallest", "omniglot", 16, 1, 1)).compute(phase)
        compute: Callable[[], Tensor] = partial(build(config=config).compute, row.phase)
        results = []
        if detail != "speed":
            peak = peak_mib(compute, device)
            row = replace(row, peak_mib=None if peak is None else row.processes * peak)
        if detail == "results":
            with AtenCalls() as calls:
                results = [compute()]
            results += [build(config=config, dtype=torch.float64).compute(row.phase)]
            row = replace(row, aten_calls=calls.count)
        if row.graph:
            compute = replaying(compute)
        timer = Timer("compute()", globals={"compute": compute}, num_threads=row.threads)
        together.wait()
        speed = row.processes * row.at_once / timer.timeit(episodes).median
        _release(device)
        return replace(row, episodes_per_second=speed), [each.cpu().numpy() for each in results]
    except BaseException:
        together.abort()  # the others need not wait for this one
        raise


def replaying(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a computation as a CUDA graph."""
    result, replay = record_on_gpu(compute)

    def replayed() -> Tensor:
        replay()
        return result

    return replayed


class AtenCalls(TorchDispatchMode):
    """Counts the operators that reach the device, in either direction."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call and make it."""
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Run ``work`` and return how far memory rises above that before, MiB.

    On CUDA the memory of PyTorch's tensors; on Linux the resident memory of this process; elsewhere
    None.
    """
    _release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / (1 << 20)
    if sys.platform != "linux":
        work()
        return None
    with contextlib.suppress(OSError):  # the peak starts again, where the system allows it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kib) / 1024


def _release(device: torch.device) -> None:
    """Return free memory to the system, for others to use while this process waits."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)
