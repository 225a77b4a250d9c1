"""The results of the benchmark: a table, a JSON file and a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raymaml.bench.contenders import PHASES, Phase
from raymaml.common.untrusted import json_text
from raymaml.storage.files import replacing, write_text

_HEADER = (
    f"  {'':<30}{'processes':>10}{'episodes':>10}{'peak':>8}{'ATen calls':>12}"
    f"{'difference in':>20}\n"
    f"  {'':<30}{'x threads':>10}{'a second':>10}{'MiB':>8}{'a result':>12}"
    f"{'float64':>10}{'float32':>10}"
)
_COLORS = ("#1f6feb", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_INK, _GRID = "#24292f", "#e4e7eb"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one configuration: a line of the table, an object of the JSON file."""

    config: str
    """Name of the configuration."""
    phase: Phase
    library: str
    """raymaml; plain (PyTorch alone); higher; torchopt."""
    method: str
    """How it computes the meta-gradient; ``adapt`` in evaluation."""
    processes: int = 1
    """Number of processes that compute at the same time, an episode each."""
    threads: int
    """Intra-op threads of each process."""
    inner_steps: int
    at_once: int = 1
    """Number of episodes that a process computes at once, by vmap or batched products."""
    graph: bool = False
    """Whether a CUDA graph replays the computation."""
    episodes_per_second: float = 0.0
    """Of all processes together; the median over the rounds."""
    peak_mib: float | None = None
    """Highest memory in one computation above that before it, MiB, times ``processes``; None where
    the system does not measure it."""
    aten_calls: int | None = None
    """Operators called in one computation; None for points of the curve, as the differences."""
    difference: float | None = None
    """Of its gradient, or logits, from the first contender's, in float32: the largest entry of the
    difference divided by the largest of the result. Where rounding tips a rectifier or a maximum
    over, a gradient may move by 1e-3."""
    difference_float64: float | None = None
    """The same in float64, where rounding gives 1e-14."""

    @property
    def contender(self) -> str:
        """Its name in the table."""
        name = f"raymaml {self.method}" if self.library == "raymaml" else self.library
        name += f" x{self.at_once}" if self.at_once > 1 else ""
        return f"{name} graph" if self.graph else name

    @property
    def name(self) -> str:
        """Its name in messages."""
        several = {"processes": self.processes, "threads": self.threads}
        return self.contender + "".join(f" ({n} {what})" for what, n in several.items() if n > 1)

    @property
    def on_the_curve(self) -> bool:
        """Whether its library is followed over the inner steps, in one process, in training."""
        followed = self.library in {"raymaml", "plain"} and self.processes == 1
        return followed and self.phase == "training" and self.at_once == 1


def table(rows: Sequence[Row]) -> str:
    """Lay out the rows of one configuration without its curve, and compare the fastest."""
    lines = [rows[0].config, _HEADER]
    for phase in PHASES:
        some = [row for row in rows if row.phase == phase and row.aten_calls is not None]
        if some:
            steps = some[0].inner_steps
            lines += [f"  {phase}, {steps} inner step{'' if steps == 1 else 's'}"]
            lines += [_line(row) for row in some]
            lines += _comparison(some)
    return "\n".join(lines)


def _line(row: Row) -> str:
    peak = "?" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
    return (
        f"    {row.contender:<28}{f'{row.processes} x {row.threads}':>10}"
        f"{row.episodes_per_second:>10.3g}{peak:>8}{row.aten_calls:>12,}"
        f"{row.difference_float64:>10.0e}{row.difference:>10.0e}"
    )


def _comparison(rows: Sequence[Row]) -> Iterator[str]:
    """Compare raymaml at its best with each other library at its own best."""
    best = {row.library: row for row in sorted(rows, key=lambda row: row.episodes_per_second)}
    ours = best.pop("raymaml", None)
    if ours is not None and best:
        ratios = [
            f"{ours.episodes_per_second / row.episodes_per_second:.2f} x {row.library}"
            f" ({row.processes} x {row.threads})"
            for row in rows
            if row in best.values()
        ]
        at = f"{ours.processes} x {ours.threads}"
        yield f"    each at its best: {ours.contender} ({at}) is {', '.join(ratios)}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write ``machine``: hardware and versions, and all ``rows``."""
    machine = {
        "processor": _processor(),
        "cores": number_of_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("raymaml", "torch", "higher", "torchopt")},
    }
    content = {"machine": machine, "rows": [asdict(row) for row in rows]}
    write_text(path, json_text(content, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def number_of_cores() -> int:
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux alone
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux alone has it
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw time and peak memory of one episode against the inner steps, as PNG.

    A column a configuration: the methods of raymaml, and plain, in one process each.
    """
    configs = list(dict.fromkeys(row.config for row in rows))
    figure = Figure(figsize=(1 + 4.4 * len(configs), 7), dpi=130, layout="constrained")
    grid = figure.subplots(2, len(configs), squeeze=False)
    for (times, memories), config in zip(grid.T, configs, strict=True):
        some = [row for row in rows if row.config == config and row.on_the_curve]
        threads = {row.threads for row in some if row.library == "raymaml"}
        _draw_column(times, memories, [r for r in some if not threads or r.threads in threads])
        times.set_title(config, loc="left", fontsize=10, fontweight="bold", color=_INK)
        memories.set_xlabel("inner steps", color=_INK)
    grid[0, 0].legend(frameon=False, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _draw_column(times: Axes, memories: Axes, rows: Sequence[Row]) -> None:
    """Draw a line a contender."""
    names = sorted({row.contender for row in rows}, reverse=True)
    for name, color in zip(names, _COLORS, strict=False):
        own = sorted((r for r in rows if r.contender == name), key=lambda row: row.inner_steps)
        steps = [row.inner_steps for row in own]
        seconds = [1 / row.episodes_per_second for row in own]
        times.plot(steps, seconds, "o-", color=color, label=name, markersize=4)
        peaks = [float("nan") if row.peak_mib is None else row.peak_mib for row in own]
        memories.plot(steps, peaks, "o-", color=color, markersize=4)
    for axes, text in ((times, "seconds an episode"), (memories, "peak memory, MiB")):
        axes.set_ylabel(text, color=_INK)
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({row.inner_steps for row in rows}))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
