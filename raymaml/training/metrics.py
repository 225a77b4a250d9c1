"""Metrics of a run: a JSON line a row, TensorBoard scalars, and the progress line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from raymaml.config.outer import OuterConfig
from raymaml.data.files import write_text
from raymaml.training.state import Validation

METRICS_FILE = "metrics.jsonl"


class TrainingMetrics(Protocol):
    """Means over the episodes of one outer step."""

    @property
    def loss(self) -> float:
        """Mean query cross-entropy."""

    @property
    def accuracy(self) -> float:
        """Mean query accuracy."""

    @property
    def grad_norm(self) -> float:
        """Euclidean norm of the meta-gradient, before clipping."""


class MetricsWriter(Protocol):
    """Receives what the loop measures."""

    def start(self, step: int) -> None:
        """Forget what was written after ``step``: the run goes on from there."""

    def training(self, step: int, metrics: TrainingMetrics) -> None:
        """Take the metrics of the outer step that led to ``step``."""

    def validation(self, validation: Validation) -> None:
        """Take a validation."""


class NoMetrics:
    """Writes nothing: for all workers but rank 0, since metrics are equal on all."""

    def start(self, step: int) -> None:
        """Do nothing."""

    def training(self, step: int, metrics: TrainingMetrics) -> None:
        """Do nothing."""

    def validation(self, validation: Validation) -> None:
        """Do nothing."""


class RunMetrics:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` into a run folder.

    Args:
        folder: the run folder.
        outer: for rate and time left.
        echo: called with each progress line.
        workers: how many train together; told beside their rate.
    """

    def __init__(
        self, folder: Path, outer: OuterConfig, echo: Callable[[str], None], workers: int = 1
    ) -> None:
        self._path = folder / METRICS_FILE
        self._outer = outer
        self._echo = echo
        self._workers = workers
        self._tensorboard_folder = folder / "tensorboard"
        self._clock = (0, 0.0)  # step and time of the last training row

    def start(self, step: int) -> None:
        """Drop rows after ``step`` and open the event file there."""
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=step + 1)
        self._clock = (step, time.perf_counter())

    def training(self, step: int, metrics: TrainingMetrics) -> None:
        """Write loss, accuracy, gradient norm and rate."""
        now = time.perf_counter()
        steps_per_second = (step - self._clock[0]) / (now - self._clock[1])
        self._clock = (step, now)
        row = {
            "step": step,
            "query_loss": metrics.loss,
            "query_accuracy": metrics.accuracy,
            "grad_norm": metrics.grad_norm,
            "episodes_per_second": steps_per_second * self._outer.meta_batch_size,
            "seconds_left": (self._outer.num_steps - step) / steps_per_second,
            "workers": self._workers,
        }
        self._write(row, "train")

    def validation(self, validation: Validation) -> None:
        """Write accuracy, its interval, and loss; the time it took is not training time."""
        row = {
            "step": validation.step,
            "val_accuracy": validation.accuracy,
            "val_ci95": validation.ci95,
            "val_loss": validation.loss,
        }
        self._write(row, "val")
        self._clock = (validation.step, time.perf_counter())

    def _write(self, row: dict[str, Any], group: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "step":
                self._tensorboard.add_scalar(f"{group}/{key}", value, row["step"])
        self._tensorboard.flush()
        self._echo(progress_line(row, self._outer.num_steps))


def write_tensorboard(
    folder: Path, scalars: Mapping[str, float], texts: Mapping[str, str], step: int
) -> None:
    """Show numbers and Markdown in TensorBoard, instead of those that ``folder`` showed before."""
    if folder.exists():
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
    with SummaryWriter(str(folder)) as writer:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        for tag, text in texts.items():
            writer.add_text(tag, text, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line torn by a kill is left out."""
    return list(_complete_rows(path)) if path.exists() else []


def _complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def progress_line(row: dict[str, Any], num_steps: int) -> str:
    """Return one line for a person."""
    step = f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"
    if "val_accuracy" in row:
        accuracy, ci95 = 100 * row["val_accuracy"], 100 * row["val_ci95"]
        return (
            f"{step}  validation accuracy {accuracy:.2f} +- {ci95:.2f}%  loss {row['val_loss']:.4f}"
        )
    return (
        f"{step}  loss {row['query_loss']:.4f}  accuracy {100 * row['query_accuracy']:.2f}%"
        f"  {row['episodes_per_second']:.1f} episodes/s  {duration(row['seconds_left'])} left"
    )


def duration(seconds: float) -> str:
    """Return a length of time for a person."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
