"""A parallel-coordinates plot: a line a trial, from value to value, to its accuracy.

pandas draws all coordinates on one scale, which serves for measurements in one unit; here each
has its own: linear, logarithmic, or a list of names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from raymaml.config.sweep import Dimension
from raymaml.evaluation.search_space import from_position, to_position
from raymaml.evaluation.sweep_table import TrialRow
from raymaml.storage.files import replacing
from raymaml.storage.place import Place

_INK, _MUTED = "#24292f", "#6e7781"
_WIDTH_OF_AN_AXIS, _HEIGHT, _DPI = 1.9, 4.6, 160
_MAP = colormaps["viridis_r"]
_DARK = (0.12, 1.0)
"""The part of the colours that is read on white: the better, the darker."""
_NUM_TICKS = 5


def plot_parallel(path: Place, rows: Sequence[TrialRow], space: dict[str, Dimension]) -> None:
    """Draw every trial that has an accuracy; the best one is thick, stopped ones are dashed.

    Equal input gives equal bytes.
    """
    shown = [row for row in rows if row.best is not None]
    accuracies = [row.best.accuracy for row in shown if row.best]
    low, high = accuracy_range(accuracies)
    figure, axes = _figure(len(space) + 1)
    for place, (key, dimension) in enumerate(space.items()):
        _draw_axis(axes, place, key, axis_ticks(dimension))
    ticks = [low + share * (high - low) for share in np.linspace(0, 1, _NUM_TICKS)]
    labels = [(to, f"{100 * at:.1f}%") for to, at in zip(np.linspace(0, 1, 5), ticks, strict=True)]
    _draw_axis(axes, len(space), "validation accuracy", labels)
    order = np.argsort(accuracies, kind="stable")  # the best is drawn last, over the others
    for rank, index in enumerate(order):
        row, height = shown[index], (accuracies[index] - low) / (high - low)
        heights = [to_position(space[key], value) for key, value in row.values.items()]
        _draw_trial(axes, row, [*heights, height], best=rank == len(order) - 1)
    with replacing(path) as file:
        # Without the version of matplotlib in it, equal pictures are equal files.
        figure.savefig(file, format="png", metadata={"Software": None})


def accuracy_range(accuracies: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis of the accuracy: whole per cents around all of them."""
    if not accuracies:
        return 0.0, 1.0
    low, high = math.floor(100 * min(accuracies)), math.ceil(100 * max(accuracies))
    return low / 100, max(high, low + 1) / 100


def axis_ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Return position (0..1) and text of what is written beside the axis of a key."""
    if dimension.integer is not None:
        low, high = dimension.integer
        every = max(1, math.ceil((high - low) / 8))
        return [(to_position(dimension, at), str(at)) for at in range(low, high + 1, every)]
    if dimension.bounds is None:
        return [(to_position(dimension, value), str(value)) for value in dimension.values]
    if dimension.log_uniform is not None:
        return _decades(dimension, *dimension.log_uniform)
    places = np.linspace(0, 1, _NUM_TICKS)
    return [(float(at), f"{from_position(dimension, float(at)):.2g}") for at in places]


def _decades(dimension: Dimension, low: float, high: float) -> list[tuple[float, str]]:
    """Return both ends, and the powers of ten that are not too close to them."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), 20)]
    inner = [at for at in powers if low < at < high and 0.07 < to_position(dimension, at) < 0.93]
    return [(to_position(dimension, at), f"{at:.3g}") for at in (low, *inner, high)]


def _figure(num_axes: int) -> tuple[Figure, Axes]:
    size = (1.2 + _WIDTH_OF_AN_AXIS * num_axes, _HEIGHT)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-0.35, num_axes - 0.65)
    axes.set_ylim(-0.06, 1.14)
    return figure, axes


def _draw_axis(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([place, place], [0, 1], color=_MUTED, linewidth=1, zorder=1)
    axes.text(place, 1.06, name, ha="center", color=_INK, fontsize=10, fontweight="bold")
    for height, text in ticks:
        axes.annotate(
            text,
            (place, height),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=_INK,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.75},
            zorder=4,
        )


def _draw_trial(axes: Axes, row: TrialRow, heights: Sequence[float], *, best: bool) -> None:
    """Draw a line through the heights that is level at each axis: crossings can be followed."""
    points, codes = [(0.0, heights[0])], [Curve.MOVETO]
    for place, (here, there) in enumerate(itertools.pairwise(heights)):
        points += [(place + 0.4, here), (place + 0.6, there), (place + 1.0, there)]
        codes += [Curve.CURVE4] * 3
    color = _MAP(_DARK[0] + (_DARK[1] - _DARK[0]) * heights[-1])
    style = "-" if row.status == "done" else (0, (4, 2))
    width = 3.0 if best else 1.3
    patch = PathPatch(
        Curve(points, codes), fill=False, edgecolor=color, linewidth=width, linestyle=style
    )
    axes.add_patch(patch)
    if best:
        axes.annotate(
            f"trial {row.trial}",
            (len(heights) - 1, heights[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=_INK,
        )
