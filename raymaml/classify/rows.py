"""The rows of a prediction, chunk by chunk.

Each chunk is judged by itself. So its rows are the same in whatever process it is judged, on CPU
bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from raymaml.classify.classifier import FewShotClassifier
from raymaml.classify.reading import Chunk, Reader
from raymaml.common.errors import UserError
from raymaml.storage.place import is_remote

_WORTH_PROCESSES = 2000
"""Pictures from which on processes start that share the work."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A classifier that has its classes, and the pictures for it; it can be sent to a process."""

    classifier: FewShotClassifier
    reader: Reader

    @property
    def device(self) -> torch.device:
        """Device of the classifier."""
        return next(self.classifier.trained.learner.model.parameters()).device

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.classifier.classes_]

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows."""
        text, number = pa.string(), pa.float32()
        first = {"path": text, "predicted": text, "probability": number, "error": text}
        return pa.schema({**first, **{f"p_{name}": number for name in self.classes}})

    def judge(self, chunk: Chunk) -> pa.Table:
        """Return a row for each picture of a chunk."""
        classes = self.classes
        chances = np.full((len(chunk.errors), len(classes)), np.nan, np.float32)
        readable = [error is None for error in chunk.errors]
        chances[readable] = self.classifier.probabilities(chunk.pixels)
        best = chances.argmax(axis=1)
        predicted = [
            None if error else classes[way] for way, error in zip(best, chunk.errors, strict=True)
        ]
        highest = chances[np.arange(len(best)), best]
        probability, *others = (
            pa.array(values, mask=np.isnan(values)) for values in (highest, *chances.T)
        )
        texts = (pa.array(each, pa.string()) for each in (chunk.names, predicted, chunk.errors))
        names, predicted, errors = texts
        return pa.table([names, predicted, probability, errors, *others], schema=self.schema)

    def rows(self, number: int) -> pa.Table:
        """Return the rows of a chunk."""
        return self.judge(self.reader.read(number))


class _Work(Dataset[Any]):
    """Numbers of chunks, and what is done with each."""

    def __init__(self, numbers: Sequence[int], function: Callable[[int], Any]) -> None:
        self._numbers, self._function = numbers, function

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._function(self._numbers[index])
        except UserError as error:  # raised, a DataLoader would put a traceback into its message
            return error


def local_rows(prediction: Prediction, numbers: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the rows of chunks, in order, judged on this machine.

    Many pictures are shared by processes, as many as there are cores: on CPU they read and judge,
    else they read. A few chunks a process are in memory.
    """
    reader, threads = prediction.reader, torch.get_num_threads()
    on_cpu = prediction.device.type == "cpu"
    processes = min(len(numbers), len(os.sched_getaffinity(0)) // threads)
    options: dict[str, Any] = {}
    if len(numbers) * reader.chunk_size >= _WORTH_PROCESSES and processes > 1:
        remote = any(is_remote(picture.place) for picture in reader.pictures)
        options = {
            "num_workers": processes,
            # neither fsspec nor OpenMP's threads bear a fork
            "multiprocessing_context": "spawn" if remote or threads > 1 else "fork",
            "worker_init_fn": partial(_set_threads, threads),
        }
    work = _Work(numbers, prediction.rows if on_cpu else reader.read)
    try:
        for done in DataLoader(work, batch_size=None, collate_fn=_as_it_is, **options):
            if isinstance(done, UserError):
                raise done
            yield done if on_cpu else prediction.judge(done)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that reads pictures has ended ({error!s:.100})",
            remedy="if the machine had no memory left, make room; then run the same command again",
        ) from error


def _set_threads(threads: int, _number: int) -> None:
    torch.set_num_threads(threads)


def _as_it_is(item: T) -> T:
    return item
