"""Metrics of a run: a JSON line a row, TensorBoard scalars, and the progress line."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import checked, json_ready, json_text, parse_json
from raymaml.config.base import Count
from raymaml.config.model import OuterConfig
from raymaml.config.pretrain import PretrainConfig
from raymaml.storage.files import (
    append_text,
    exists,
    on_disk,
    read_bytes,
    storing,
    upload,
    write_text,
)
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import temporary_folder
from raymaml.training.state import Validation

METRICS_FILE = "metrics.jsonl"
Show = Callable[[Mapping[str, Any]], None]
"""Shows the numbers of a row, by name, somewhere else as well."""
_ROW = TypeAdapter(dict[str, Count | float | None])


class NoMetrics:
    """Writes nothing: for all workers but rank 0, since metrics are equal on all."""

    def _nothing(self, *_what: object) -> None:
        pass

    start = training = validation = _nothing


class RunMetrics:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` into a run folder.

    At a URI, where nothing can be appended, both are written again with each row.

    Args:
        folder: the run folder.
        outer: for rate and time left.
        echo: called with each progress line.
        show: called with each row that is written.
        workers: number of workers that train together, written beside their rate.
    """

    def __init__(
        self,
        folder: Place,
        outer: OuterConfig | PretrainConfig,
        echo: Callable[[str], None],
        show: Show = lambda _row: None,
        *,
        workers: int = 1,
    ) -> None:
        self._path = folder / METRICS_FILE
        self._outer = outer
        self._echo = echo
        self._show = show
        self._workers = workers
        self._shown = folder / "tensorboard"
        if is_remote(folder):
            stack = contextlib.ExitStack()
            self._events = stack.enter_context(temporary_folder())
            weakref.finalize(self, stack.close)
        else:
            self._events = folder / "tensorboard"
        self._clock = (0, 0.0)  # step and time of the last training row

    def start(self, step: int) -> None:
        """Drop rows after ``step`` and open the event file there."""
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json_text(row) + "\n" for row in kept))
        with storing(self._events, self._events):
            self._tensorboard = _EventFile(self._events, purge_step=step + 1)
        self._clock = (step, time.perf_counter())

    def training(self, step: int, means: Mapping[str, float]) -> None:
        """Write the means over the episodes of an outer step, and the rate.

        They are ``query_loss``, a cross-entropy; ``query_accuracy``, 0..1; ``grad_norm``, the
        Euclidean norm of the meta-gradient before clipping; and the metrics of its method.
        """
        now = time.perf_counter()
        steps_per_second = (step - self._clock[0]) / (now - self._clock[1])
        self._clock = (step, now)
        row = {
            "step": step,
            **means,
            f"{self._outer.unit}_per_second": steps_per_second * self._outer.per_step,
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
        with storing(self._path, self._path):
            append_text(self._path, json_text(row) + "\n")
        with storing(self._events, self._events):
            for key, value in row.items():
                if key != "step":
                    self._tensorboard.add(scalar(f"{group}/{key}", value), row["step"])
            self._tensorboard.flush()
        if is_remote(self._shown):
            upload(self._events, self._shown)
        self._show(row)
        self._echo(progress_line(row, self._outer.num_steps))


MetricsWriter = RunMetrics | NoMetrics


class _EventFile:
    """A new file of TensorBoard events, written by the thread that adds them.

    tensorboardX's own writer has a thread for it. A full disk ends that with a traceback, and the
    thread that adds the next dozen values then waits for ever.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        weakref.finalize(self, _close, self._writer)
        if purge_step is not None:  # TensorBoard forgets what it read of this step and later ones
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=purge_step, session_log=start))
            self.flush()

    def add(self, summary: Any, step: int) -> None:
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _close(writer: Any) -> None:
    with contextlib.suppress(OSError):  # of a full disk, which the last write reported
        writer.close()


def write_tensorboard(
    folder: Place, scalars: Mapping[str, float], texts: Mapping[str, str], step: int
) -> None:
    """Show numbers and Markdown in TensorBoard, instead of those that ``folder`` showed before."""
    if folder.exists():
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
    with on_disk(folder) as place, storing(place, place):
        file = _EventFile(place)
        for tag, value in scalars.items():
            file.add(scalar(tag, value), step)
        for tag, content in texts.items():
            file.add(text(tag, content), step)
        file.flush()


def read_metrics(path: Place) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line torn by a kill is left out.

    A number that is not finite is None.

    Raises:
        UserError: another line is no row.
    """
    rows = []
    lines = read_bytes(path).splitlines() if exists(path) else []
    for number, line in enumerate(lines, 1):
        try:
            row = checked(_ROW, parse_json(line))
            if not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: is no row of metrics ({reason_of(error)})",
                remedy="mend or remove the line",
            ) from None
        rows.append(json_ready(row))  # older files hold Infinity
    return rows


def progress_line(row: dict[str, Any], num_steps: int) -> str:
    """Return one line for a person."""
    step = f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"
    if "val_accuracy" in row:
        accuracy, ci95 = 100 * row["val_accuracy"], 100 * row["val_ci95"]
        return (
            f"{step}  validation accuracy {accuracy:.2f} +- {ci95:.2f}%  loss {row['val_loss']:.4f}"
        )
    unit = "images" if "images_per_second" in row else "episodes"
    return (
        f"{step}  loss {row['query_loss']:.4f}  accuracy {100 * row['query_accuracy']:.2f}%"
        f"{_solved(row)}  {row[f'{unit}_per_second']:.1f} {unit}/s"
        f"  {duration(row['seconds_left'])} left"
    )


def _solved(row: Mapping[str, Any]) -> str:
    """Return how far the linear systems of implicit MAML are solved; empty without them."""
    if "cg_residual" not in row:
        return ""
    indefinite = row["cg_curvature"] <= 0
    advice = f"  curvature {row['cg_curvature']:.2g}: raise inner.proximal" if indefinite else ""
    return f"  residual {row['cg_residual']:.2g}{advice}"


def duration(seconds: float) -> str:
    """Return a length of time for a person."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
