"""How many episodes a process computes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeVar

import torch

from raymaml.common.logs import LOG
from raymaml.common.memory import MIB
from raymaml.config.inner import InnerConfig
from raymaml.config.schema import ClusterConfig
from raymaml.training.data import EpisodeSet
from raymaml.training.explain import is_out_of_memory
from raymaml.training.graphs import forget_recordings
from raymaml.types import EpisodeBatch

T = TypeVar("T")
SHARE, JUDGING_SHARE = 0.7, 0.4
"""Shares of the free memory of a GPU that the episodes at once may take in training and judging; a
validation comes first, and its CUDA graph keeps its memory."""
_LOADED, _LOADED_FOR_GPU = 8, 64
_MOST_BYTES = 1 << 29
_TRIAL = 2
"""Episodes at once that are measured."""


class Memory(Protocol):
    """The memory of a device."""

    def free(self) -> int:
        """Return the bytes that new tensors can take."""

    def peak_of(self, call: Callable[[], T]) -> tuple[T, int]:
        """Return the result of a call, and the most bytes that it took beyond those in use."""

    def release(self) -> None:
        """Give back the memory that an allocator keeps."""


class GpuMemory:
    """The memory of a CUDA device, by PyTorch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """See ``Memory``."""
        torch.cuda.empty_cache()  # what stays is in use, or of CUDA graphs
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_of(self, call: Callable[[], T]) -> tuple[T, int]:
        """See ``Memory``."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        result = call()
        return result, torch.cuda.max_memory_allocated(self._device) - before

    def release(self) -> None:
        """See ``Memory``."""
        forget_recordings()
        torch.cuda.empty_cache()


class AtOnce:
    """The number of episodes at once: a given one, or as many as the memory of a GPU allows.

    Then two episodes are computed first and measured. Where memory runs out all the same, the
    number is halved and the episodes are computed again. Results are equal to rounding.

    Args:
        number: of episodes at once; "auto": 1 on a CPU, which is fastest there.
        device: of the process.
        memory: of the device; None: PyTorch's.
        share: of the free memory that they may take.
    """

    def __init__(
        self,
        number: int | Literal["auto"],
        device: torch.device,
        memory: Memory | None = None,
        share: float = SHARE,
    ) -> None:
        self._share = share
        self._memory: Memory | None = None
        if number == "auto" and (memory is not None or device.type == "cuda"):
            self._memory = memory or GpuMemory(device)
        self._most = number if number != "auto" else 1 if self._memory is None else 0
        """0: not measured yet."""
        self.announce: Callable[[str], None] = LOG.info
        self.loaded = _LOADED_FOR_GPU if self._memory else _over(_LOADED, self._most) * self._most
        """Number of episodes to judge whose images are in memory together..."""
        self.most_bytes = _MOST_BYTES if self._memory else math.inf
        """...and their bytes."""

    def apply(self, count: int, compute: Callable[[range], Sequence[T]]) -> Iterator[T]:
        """Yield the results of episodes 0 to ``count`` - 1.

        They are computed in runs of a given number, of which the last may be shorter; or in runs of
        lengths as equal as possible, where memory decides.

        Args:
            count: number of episodes.
            compute: episodes -> a result of each.
        """
        first = 0
        while first < count:
            left, length = count - first, self._most or _TRIAL
            if self._memory is not None:
                length = _over(left, _over(left, length))
            rows = range(first, min(first + length, count))
            if (found := self._tried(rows, compute)) is None:
                continue
            yield from found
            first = rows.stop

    def _tried(self, rows: range, compute: Callable[[range], Sequence[T]]) -> Sequence[T] | None:
        """Return the results; None: memory ran out, and the number is halved."""
        memory = self._memory
        if memory is None:
            return compute(rows)
        try:
            if self._most:
                return compute(rows)
            return self._measured(memory, rows, compute)
        except Exception as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        # after the `except`, which holds the tensors of the failed call
        self._most = len(rows) // 2
        memory.release()
        self.announce(f"memory has room for {self._most} episodes at once, not {len(rows)}")
        return None

    def _measured(
        self, memory: Memory, rows: range, compute: Callable[[range], Sequence[T]]
    ) -> Sequence[T]:
        free = memory.free()
        found, peak = memory.peak_of(lambda: compute(rows))
        if len(rows) < _TRIAL:  # one is computed another way
            return found
        each = max(1, peak // len(rows))
        self._most = max(1, int(self._share * free) // each)
        sizes = f"each takes {each / MIB:.0f} MiB, and {free / MIB:.0f} MiB are free"
        self.announce(f"{self._most} episodes fit into memory at once: {sizes}")
        return found


def computed(
    episodes: EpisodeSet,
    indices: range,
    at_once: AtOnce,
    compute: Callable[[EpisodeBatch], Sequence[T]],
) -> Iterator[T]:
    """Yield the results of episodes of a set, in order, each run seeded by its first episode."""
    for some, loaded in episodes.loaded(indices, at_once.loaded, at_once.most_bytes):

        def of_rows(rows: range, some: range = some, loaded: EpisodeBatch = loaded) -> Sequence[T]:
            torch.manual_seed(episodes.seed_of(some[rows.start]))
            return compute(loaded.among(rows))

        yield from at_once.apply(len(some), of_rows)


def _over(count: int, by: int) -> int:
    """Divide, and round up."""
    return -(-count // by)


def judging_at_once(cluster: ClusterConfig, inner: InnerConfig, device: torch.device) -> AtOnce:
    """Return the number of episodes to judge at once.

    Rows of the support set that each inner step draws depend on the episode alone: so one by one.
    """
    draws = inner.support_batch_size is not None
    return AtOnce(1 if draws else cluster.episodes_per_chunk, device, share=JUDGING_SHARE)
