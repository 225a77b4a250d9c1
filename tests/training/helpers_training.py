"""Runs in this process that something happens to, and all that they must end in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymaml.config.schema import Config
from raymaml.training.checkpoint import find_checkpoint, list_steps, read_card, weights_of
from raymaml.training.data import TrainingData
from raymaml.training.loop import meta_train
from raymaml.training.metrics import METRICS_FILE, NoMetrics, RunMetrics, read_metrics
from raymaml.training.reduction import mean_in_order
from raymaml.training.run import open_run
from raymaml.training.session import LocalSession
from raymaml.training.state import Validation
from raymaml.training.store import CheckpointStore
from raymaml.training.worker import train_worker
from raymaml.types import EpisodeBatch

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for kill -9: nothing that runs in the process may catch it."""


class Disturbed(LocalSession):
    """A lone process to which something happens.

    Args:
        data: the training data.
        stop_during: outer step during which it is asked to stop.
        die_before: outer step before which it is killed.
        die_at_report: number of the report at which it is killed, from 1.
        change: what outer step 2 learns from instead of its meta-batch.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        stop_during: int = -1,
        die_before: int = -1,
        die_at_report: int = -1,
        change: Callable[[EpisodeBatch], EpisodeBatch] = lambda batch: batch,
    ) -> None:
        super().__init__(data, CPU)
        self.stop_during, self.die_before, self.reports = stop_during, die_before, die_at_report
        self.change, self.step = change, -1

    def meta_batches(self, first_step: int) -> Iterator[EpisodeBatch]:
        for step, batch in enumerate(super().meta_batches(first_step), first_step):
            if step == self.die_before:
                raise Killed
            self.step = step
            yield self.change(batch) if step == 2 else batch

    def stop_requested(self) -> bool:
        # asked before the step's work, after its episodes were fetched
        return self.step == self.stop_during

    def report(self, step: int, validation: Validation | None, checkpoint: Path) -> None:
        self.reports -= 1
        if self.reports == 0:
            raise Killed


class ThreadSession(LocalSession):
    """One of several workers that are threads of this process."""

    def __init__(self, data: TrainingData, rank: int, group: Group) -> None:
        super().__init__(data, CPU)
        self.rank, self.world_size, self._group = rank, group.world_size, group

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        assert len(rows) == counts[self.rank]
        return torch.cat(self._group.exchange(self.rank, rows))

    def mean(self, rows: Tensor, counts: list[int]) -> Tensor:
        return mean_in_order(self.gather(rows, counts))

    def from_rank_zero(self, value: int) -> int:
        return self._group.exchange(self.rank, value)[0]

    def report(self, step: int, validation: Validation | None, checkpoint: Path) -> None:
        # Ray Train's report is a barrier too: all workers must come by equally often
        self._group.exchange(self.rank, None)


class Group:
    """What the threads of one run share. They run in turn, each from one exchange to the next:
    random numbers belong to the whole process, and a worker draws its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._slots: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._turn = threading.Lock()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._wait()
        values = list(self._slots)
        self._wait()
        return values

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def run(self, worker: Callable[[int], None]) -> None:
        def guarded(rank: int) -> None:
            try:
                with self._turn:
                    worker(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            done = [pool.submit(guarded, rank) for rank in range(self.world_size)]
        errors = [error for future in done if (error := future.exception())]
        errors.sort(key=lambda each: isinstance(each, threading.BrokenBarrierError))
        for error in errors:
            raise error


def run(config: Config, kind: Callable[..., LocalSession] = Disturbed, **disturbance: Any) -> Path:
    """Train in this process in the run folder of ``config``, by default undisturbed."""
    opened_run = open_run(config, CPU)
    session = kind(opened_run.data, **disturbance)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    train_worker(opened_run, session, lambda _line: None)
    return config.run_folder


def run_with_workers(config: Config, world_size: int) -> Path:
    """Train with several workers; rank 0 alone writes metrics."""
    folder, group = config.run_folder, Group(world_size)
    folder.mkdir(parents=True, exist_ok=True)

    def worker(rank: int) -> None:
        run = open_run(config, CPU)  # its own learner
        store = CheckpointStore(folder, run.identity)
        writer = RunMetrics(folder, config.steps, lambda _line: None) if rank == 0 else NoMetrics()
        meta_train(run, store, writer, ThreadSession(run.data, rank, group))

    group.run(worker)
    return folder


def result(folder: Path) -> tuple[Any, ...]:
    """All that must be equal to the last bit: weights, optimizer, validations, metrics."""
    path = find_checkpoint(folder, "last")
    card = read_card(path)
    tensors = [weights_of(path, CPU), torch.load(path / "optimizer.pt", weights_only=True)]
    timing = {"episodes_per_second", "images_per_second", "seconds_left"}
    rows = [
        {key: value for key, value in row.items() if key not in timing}
        for row in read_metrics(folder / METRICS_FILE)
    ]
    kept = list_steps(folder), card.runners_up
    return bits(tensors), card.step, card.validation, card.best, rows, kept


def bits(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return (str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes())
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return [bits(value) for value in tree] if isinstance(tree, list) else tree
