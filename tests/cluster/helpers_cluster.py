"""Looking at runs, weights and processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import psutil
from machinery import title, wait_until

from raymaml.training.metrics import METRICS_FILE, read_metrics

RATE = r"\d+\.\d episodes/s  (\d+h\d\dm|\d+m\d\ds) left"
"""How every progress line ends, as a regular expression."""

_PERCENT = r"\d{1,3}\.\d\d"
_OF_TRAINING = (
    r".*: the inner loop adapts|  \S.* [\d,]+  (adapts|[\d,]+ adapt)",
    rf"step +\d+/\d+  loss \d+\.\d{{4}}  accuracy {_PERCENT}%  {RATE}",
    rf"step +\d+/\d+  validation accuracy {_PERCENT} \+- {_PERCENT}%  loss \d+\.\d{{4}}",
)
"""What a run prints between its first and its last line."""

SETTINGS = (
    "worker(s) of 1 thread(s), freed memory is kept, channels_last, float32;"
    " meta-gradient by unrolled (auto)"
)
"""How the first line of a run of the tiny config ends, on CPU."""


def not_of_training(lines: Iterable[str]) -> list[str]:
    """Return what is no line of a run's: of Ray, a warning, a traceback, a colour."""
    known = re.compile("|".join(_OF_TRAINING))
    return [line for line in lines if not known.fullmatch(line)]


def trained_steps(folder: Path) -> int:
    """Return how many outer steps a run has written metrics of."""
    return max((row["step"] for row in read_metrics(folder / METRICS_FILE)), default=0)


def attempts(folder: Path) -> int:
    """Return how often rank 0 began to train: each time it opens an event file of its own."""
    return len(list((folder / "tensorboard").iterdir()))


def pids(name: str) -> list[int]:
    """Return the processes of the actors of a class, which Ray names after it, of our cluster."""
    found = psutil.Process().children(recursive=True)
    return [process.pid for process in found if title(process).startswith(f"ray::{name}")]


@contextmanager
def at_step(folder: Path, step: int, action: Callable[[], None]) -> Iterator[None]:
    """During the block, act once the run in ``folder`` has come to a step."""

    def act() -> None:
        wait_until(lambda: trained_steps(folder) >= step, f"at step {step}")
        action()

    thread = Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join()
