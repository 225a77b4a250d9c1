"""What has been measured: a table, a JSON file and a picture."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from raymaml.bench.cases import PHASES
from raymaml.bench.measure import number_of_cores
from raymaml.bench.rows import Row
from raymaml.common.untrusted import json_text
from raymaml.storage.files import replacing, write_text

_HEADER = (
    f"  {'':<22}{'processes':>10}{'episodes':>10}{'peak':>8}{'ATen calls':>12}"
    f"{'difference in':>20}\n"
    f"  {'':<22}{'x threads':>10}{'a second':>10}{'MiB':>8}{'an episode':>12}"
    f"{'float64':>10}{'float32':>10}"
)
_COLORS = ("#1f6feb", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_INK, _GRID = "#24292f", "#e4e7eb"


def table(rows: Sequence[Row]) -> str:
    """Lay out the rows of one configuration, but those of the curve; and who is fastest."""
    lines = [f"{rows[0].config}", _HEADER]
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
        f"    {row.contender:<20}{f'{row.processes} x {row.threads}':>10}"
        f"{row.episodes_per_second:>10.3g}{peak:>8}{row.aten_calls:>12,}"
        f"{row.difference_float64:>10.0e}{row.difference:>10.0e}"
    )


def _comparison(rows: Sequence[Row]) -> Iterator[str]:
    """Compare raymaml at its best with each other library at its own best."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.library not in best or (
            row.episodes_per_second > best[row.library].episodes_per_second
        ):
            best[row.library] = row
    ours = best.pop("raymaml", None)
    if ours is None or not best:
        return
    ratios = [
        f"{ours.episodes_per_second / row.episodes_per_second:.2f} x {name}"
        f" ({row.processes} x {row.threads})"
        for name, row in best.items()
    ]
    at = f"{ours.processes} x {ours.threads}"
    yield f"    each at its best: {ours.contender} ({at}) is {', '.join(ratios)}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write ``machine``, and all ``rows``."""
    content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    write_text(path, json_text(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on, but the load."""
    versions: dict[str, str | None] = {}
    for name in ("raymaml", "torch", "higher", "torchopt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": number_of_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw time and peak memory of one episode against the inner steps, as PNG.

    A column a configuration: the methods of raymaml, and plain, one process each.
    """
    configs = list(dict.fromkeys(row.config for row in rows))
    figure = Figure(
        figsize=(1 + 4.4 * len(configs), 7), dpi=130, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(configs), squeeze=False)
    for (times, memories), config in zip(grid.T, configs, strict=True):
        drawn = _draw_column(times, memories, curve(rows, config))
        times.set_title(config, loc="left", fontsize=10, fontweight="bold", color=_INK)
        _finish(times, "seconds an episode", drawn)
        _finish(memories, "peak memory, MiB", drawn)
        memories.set_xlabel("inner steps", color=_INK)
    grid[0, 0].legend(frameon=False, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def curve(rows: Sequence[Row], config: str) -> dict[str, list[Row]]:
    """Return the rows of the curve of ``config``, by contender, in the order of their steps."""
    training = [row for row in rows if row.config == config and row.phase == "training"]
    threads = {row.threads for row in training if row.library == "raymaml"}
    lines: dict[str, list[Row]] = {}
    for row in sorted(training, key=lambda row: row.inner_steps):
        on_the_curve = row.library in {"raymaml", "plain"} and row.processes == 1
        if on_the_curve and (not threads or row.threads in threads):
            lines.setdefault(row.contender, []).append(row)
    return lines


def _draw_column(times: Axes, memories: Axes, lines: dict[str, list[Row]]) -> list[int]:
    """Draw a line a contender and return the inner steps that occur."""
    for (name, rows), color in zip(sorted(lines.items(), reverse=True), _COLORS, strict=False):
        steps = [row.inner_steps for row in rows]
        seconds = [1 / row.episodes_per_second for row in rows]
        times.plot(steps, seconds, "o-", color=color, label=name, markersize=4)
        points = [(row.inner_steps, row.peak_mib) for row in rows if row.peak_mib is not None]
        if points:
            memories.plot(*zip(*points, strict=True), "o-", color=color, markersize=4)
    return sorted({row.inner_steps for rows in lines.values() for row in rows})


def _finish(axes: Axes, label: str, steps: list[int]) -> None:
    axes.set_ylabel(label, color=_INK)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
