"""A worker's view of a run under Ray Train."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor
from torch.nn import functional as F

from raymaml.cluster.stream import stream_meta_batches
from raymaml.storage.place import Place, is_remote
from raymaml.training.data import MetaBatches, TrainingData
from raymaml.training.images import LabelledImages
from raymaml.training.reduction import mean_in_order
from raymaml.training.run import watch_stop
from raymaml.training.session import Ask, EndedEarly
from raymaml.training.state import Validation


class RaySession:
    """The ``Session`` of one of Ray Train's workers; collectives by gloo or NCCL.

    Args:
        stop_folder: the folder in which a stop is asked for.
        data: the training data.
        num_steps: number of outer steps.
        timeout: seconds to wait for data.
        fast: reduce gradients by one all-reduce, equal to rounding alone.
        ask: for a trial of a sweep: rank 0 calls it with each validation of this process.
    """

    fast: bool

    def __init__(
        self,
        stop_folder: Place,
        data: TrainingData,
        num_steps: int,
        timeout: float,
        *,
        fast: bool,
        ask: Ask | None = None,
    ) -> None:
        self.fast = fast
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._data = data
        self._num_steps = num_steps
        self._timeout = timeout
        self._stop_asked_for = watch_stop(stop_folder)
        self._ask = ask

    def meta_batches(self, first_step: int) -> MetaBatches:
        """Stream this worker's share through Ray Data; images without episodes are read here."""
        if isinstance(self._data.train, LabelledImages):
            return self._data.meta_batches(first_step, self.rank, self.world_size)
        steps = range(first_step, self._num_steps)
        return stream_meta_batches(self._data, steps, self.rank, self.world_size, self._timeout)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Pad all shares to the largest, all-gather, and cut the padding out."""
        if self.world_size == 1:
            return rows
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.world_size * max(counts), rows.shape[1])
        dist.all_gather_into_tensor(gathered, padded)
        shares = gathered.split(max(counts))
        return torch.cat([s[:count] for s, count in zip(shares, counts, strict=True)])

    def mean(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Each worker averages a slice of all rows; then all gather the slices. Or all-reduce.

        The bits are those of one worker that adds all rows up: entries do not meet. Each worker
        sends its rows once: of W workers with a row each, as much as an all-reduce.
        """
        if self.world_size == 1:
            return mean_in_order(rows)
        if self.fast:
            total = rows.sum(0)
            dist.all_reduce(total)
            return total / sum(counts)
        length = rows.shape[1]
        width = -(-length // self.world_size)
        padded = F.pad(rows, (0, width * self.world_size - length))
        mine = padded.view(len(rows), self.world_size, width).transpose(0, 1).reshape(-1)
        received = rows.new_empty(sum(counts) * width)
        dist.all_to_all_single(
            received,
            mine,
            [count * width for count in counts],
            [len(rows) * width] * self.world_size,
        )
        mean = rows.new_empty(self.world_size * width)
        dist.all_gather_into_tensor(mean, mean_in_order(received.view(-1, width)))
        return mean[:length]

    def from_rank_zero(self, value: int) -> int:
        """Broadcast rank 0's value."""
        tensor = torch.tensor([value], device=self.device)
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def stop_requested(self) -> bool:
        """Look for the stop file; rank 0 does it for all, and the reduction spreads its answer."""
        return self.rank == 0 and self._stop_asked_for()

    def report(self, step: int, validation: Validation | None, checkpoint: Place) -> None:
        """Report a checkpoint that is in place already to Ray Train; ask whether a trial goes on.

        Asynchronous: a synchronous report waits for the controller, up to 2 s when the one before
        it was less than that ago.

        Raises:
            EndedEarly: on all workers, if the answer is no.
        """
        metrics = {} if validation is None else {"val_accuracy": validation.accuracy}
        ray.train.report(
            {"step": step, **metrics},
            checkpoint=Checkpoint(*as_arrow(checkpoint)) if self.rank == 0 else None,
            checkpoint_dir_name=checkpoint.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_already_in_place,
            delete_local_checkpoint_after_upload=False,
        )
        if self._ask is not None:
            answer = self.rank != 0 or validation is None or self._ask(validation)
            if not self.from_rank_zero(answer):
                raise EndedEarly


def _already_in_place(checkpoint: Checkpoint, _name: str) -> Checkpoint:
    return checkpoint


def as_arrow(place: Place) -> tuple[str, Any]:
    """Return a place as Ray takes it: a path, and its file system of pyarrow (None: the disk)."""
    if not is_remote(place):
        return str(place.absolute()), None
    return place.path, PyFileSystem(FSSpecHandler(place.fs))
