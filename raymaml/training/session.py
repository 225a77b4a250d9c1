"""The session: the view that the training loop has of the other workers and of its data."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from raymaml.storage.place import Place
from raymaml.training.data import MetaBatches, TrainingData
from raymaml.training.reduction import flatten, mean_in_order, unflatten
from raymaml.training.state import Validation
from raymaml.types import Params

Ask = Callable[[Validation], bool]
"""Takes a validation, whose checkpoint is in place, and returns whether the run goes on."""


class EndedEarly(Exception):  # noqa: N818  (not an error)
    """A trial of a sweep ends before its last outer step; its checkpoint is in place."""


class Session(Protocol):
    """One worker's view of the run.

    Every method but ``stop_requested`` is called by all workers in the same order, with arguments
    that agree; a branch around such a call must depend on agreed numbers alone (contract 5).
    """

    rank: int
    world_size: int
    device: torch.device

    def meta_batches(self, first_step: int) -> MetaBatches:
        """Yield this worker's share of the meta-batches of outer steps ``first_step, ...``.

        Close it: it reads ahead in a thread.
        """

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate ``[counts[rank], D]`` of all workers by rank: ``[sum(counts), D]``."""

    def mean(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Average ``[counts[rank], D]`` of all workers: ``[D]``, added row after row by rank."""

    def from_rank_zero(self, value: int) -> int:
        """Return rank 0's ``value`` on every worker."""

    def stop_requested(self) -> bool:
        """Return whether somebody asked for a stop; workers need not agree."""

    def report(self, step: int, validation: Validation | None, checkpoint: Place) -> None:
        """Report a complete checkpoint, and the validation of its weights, if there is one.

        Raises:
            EndedEarly: on all workers, where the run is a trial of a sweep and ends here.
        """


def gather_by_name(
    session: Session, rows: Sequence[Mapping[str, Tensor]], like: Params, sizes: list[int]
) -> Params:
    """Bring together what all workers know of their episodes, in episode order.

    Args:
        session: of this worker.
        rows: values by name, for each episode of this worker.
        like: tensors of the same names and shapes, on the session's device.
        sizes: number of episodes of each worker, E in all.

    Returns:
        By name, ``[E, *shape]``.
    """
    own = [flatten({name: row[name] for name in like})[None] for row in rows]
    nothing = torch.empty(0, len(flatten(like)), device=session.device)
    return unflatten(session.gather(torch.cat([nothing, *own]), sizes), like)


class LocalSession:
    """One process, no Ray: for debugging, for notebooks, and the measure of Ray's overhead.

    Args:
        data: the training data.
        device: the device to learn on.
        ask: for a trial of a sweep: called with each validation of this process.
        stop: called at each outer step, beside the event ``stop``: whether to stop there.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        data: TrainingData,
        device: torch.device,
        ask: Ask | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device = device
        self.stop = threading.Event()
        self._data = data
        self._ask = ask
        self._stop = stop

    def meta_batches(self, first_step: int) -> MetaBatches:
        """Read the shards by memory map, two meta-batches ahead."""
        return self._data.meta_batches(first_step, self.rank, self.world_size)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Return ``rows``: they are all."""
        assert counts == [len(rows)]
        return rows

    def mean(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Average all rows."""
        assert counts == [len(rows)]
        return mean_in_order(rows)

    def from_rank_zero(self, value: int) -> int:
        """Return ``value``."""
        return value

    def stop_requested(self) -> bool:
        """Return whether a signal handler has set ``stop``, or the caller's ``stop`` is true."""
        return self.stop.is_set() or self._stop()

    def report(self, step: int, validation: Validation | None, checkpoint: Place) -> None:
        """Ask whether a trial of a sweep goes on."""
        if self._ask is not None and validation is not None and not self._ask(validation):
            raise EndedEarly
