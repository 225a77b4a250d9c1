"""The figures of a report, drawn without any global state of matplotlib.

Accuracies come in 0..1 and are drawn in per cent. Equal input gives equal bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from raymaml.reports.summary import Numbers, percent
from raymaml.statistics.intervals import FIRST_EPISODES, bounded_interval
from raymaml.storage.files import replacing

Arm = TypeVar("Arm")

_WIDTH, _HEIGHT = 7.2, 4.05  # inches; 1152 x 648 pixels
_ROW = 0.34  # inches that the label of an arm takes
_DPI = 160
_INK, _MUTED, _GRID = "#24292f", "#6e7781", "#e4e7eb"
_MAIN = "#1f6feb"
_OTHERS = ("#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_BARS = "#b3cff8"
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # covers the grid behind
_SHARE_OF_HEIGHT, _RIGHT_EDGE = ("data", "axes fraction"), ("axes fraction", "data")
_MAX_BARS = 80
_TICK_STEPS = [1, 2, 2.5, 5, 10]
# Not PercentFormatter: it writes 60.0% for 60% when the axis is shorter than 50%.
_PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")
_COUNT = StrMethodFormatter("{x:,.0f}")


def distribution(path: Path, accuracy: NDArray[np.float64], mean: Numbers) -> None:
    """Draw how ``accuracy`` [E] is spread over episodes, with its mean and the mean's interval."""
    edges = bar_edges(accuracy)
    shares = np.histogram(accuracy, edges)[0] / len(accuracy)
    title = f"Accuracy of {len(accuracy):,} episodes"
    figure, axes = _figure(title, "accuracy of an episode", "share of episodes", x_format=_PERCENT)
    axes.bar(edges[:-1], shares, np.diff(edges) * 0.92, align="edge", color=_BARS)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks(round_ticks(edges[0], min(edges[-1], 1.0)))
    axes.set_ylim(0, shares.max() * 1.25)  # the label of the mean stands above the bars
    # The interval of a handful of episodes is far wider than the picture.
    left, right = np.clip(mean["interval95"], *axes.get_xlim())
    axes.axvspan(left, right, color=_INK, alpha=0.15, lw=0)
    axes.axvline(mean["mean"], color=_INK, linewidth=2)
    text = f"mean {percent(mean)}\n(95% interval)"
    on_left = mean["mean"] > sum(axes.get_xlim()) / 2
    at, offset, side = (left, -8, "right") if on_left else (right, 8, "left")
    style = {"fontsize": 12, "fontweight": "bold", "bbox": _ON_WHITE, "xycoords": _SHARE_OF_HEIGHT}
    _write(axes, text, (at, 0.97), (offset, 0), _INK, ha=side, va="top", **style)
    _save(figure, path)


def accuracy_by_step(path: Path, arms: Mapping[str, Numbers], chance: float) -> None:
    """Draw the mean accuracy of each arm after 0..T inner steps.

    An arm that takes fewer steps than another goes on as a dotted line: it stays where it is.
    """
    last_step = max(len(arm["accuracy_by_step"]) for arm in arms.values()) - 1
    right = max(last_step, 1)
    figure, axes = _figure("Accuracy by inner step", "inner steps", "mean accuracy", arms=len(arms))
    axes.axhline(chance, color=_MUTED, linewidth=1, zorder=1)
    labels = [(chance, f"chance  {chance:.1%}", _MUTED)]
    for (name, arm), color in _colored(arms):
        found = arm["accuracy_by_step"]
        steps = np.arange(len(found))
        means, low, high = np.array([(each["mean"], *each["interval95"]) for each in found]).T
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        # Not clipped: the last marker stands on the right edge.
        axes.plot(steps, means, color=color, linewidth=2, marker="o", markersize=5, clip_on=False)
        axes.plot([steps[-1], right], [means[-1]] * 2, color=color, linewidth=1.5, linestyle=":")
        labels.append((means[-1], f"{name}  {means[-1]:.1%}", color))
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(round_ticks(0, last_step, integer=True))
    _label_right(axes, labels)
    _save(figure, path)


def mean_accuracies(path: Path, arms: Mapping[str, Numbers]) -> None:
    """Draw the mean of each arm with its intervals over episodes (thick) and for new classes."""
    legend = "thick: 95% interval over episodes; thin: for new classes"
    figure, axes = _figure("Mean accuracy of the arms", legend, x_format=_PERCENT, arms=len(arms))
    ends = []
    for place, ((name, arm), color) in enumerate(_colored(arms)):
        accuracy, mean = arm["accuracy"], arm["accuracy"]["mean"]
        ends.append(mean)
        for interval, width in ((accuracy["new_classes"], 1.5), (accuracy, 6)):
            if math.isfinite(interval["ci95"]):
                span = interval["interval95"]
                axes.plot(span, [place] * 2, color=color, linewidth=width, solid_capstyle="butt")
                ends += span
        axes.plot([mean], [place], color=color, marker="o", markersize=7)
        _write(axes, f"{name}  {mean:.2%}", (mean, place), (0, 9), color, ha="center")
    room = 0.25 * (max(ends) - min(ends)) + 0.005
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(arms) - 0.5, -0.8)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x", color=_GRID, linewidth=1)
    _save(figure, path)


def running_mean(path: Path, arms: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the mean of the first n accuracies [E] of each arm with its interval, over n."""
    title = "Mean accuracy over the first episodes"
    figure, axes = _figure(title, "episodes", "mean accuracy", x_format=_COUNT, arms=len(arms))
    labels, shown = [], []
    for (name, accuracy), color in _colored(arms):
        # A few hundred points look like all of them.
        n = np.unique(np.geomspace(min(10, len(accuracy)), len(accuracy), 400).astype(int))
        found = [bounded_interval(accuracy[:count]) for count in n]
        means, low, high = np.array([(each.mean, each.low, each.high) for each in found]).T
        axes.fill_between(n, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(n, means, color=color, linewidth=1.5)
        labels.append((means[-1], f"{name}  {means[-1]:.1%}", color))
        late = n > len(accuracy) // 50
        shown += [low[late].min(), high[late].max()]
    axes.set_ylim(max(min(shown) - 0.01, -0.02), min(max(shown) + 0.01, 1.02))
    count = max(map(len, arms.values()))
    axes.set_xlim(0, max(count, 2))
    if count > FIRST_EPISODES:
        axes.axvline(FIRST_EPISODES, color=_MUTED, linewidth=1, linestyle="--")
        text = f"first {FIRST_EPISODES}"
        _write(axes, text, (FIRST_EPISODES, 0.02), (5, 0), _MUTED, xycoords=_SHARE_OF_HEIGHT)
    _label_right(axes, labels)
    _save(figure, path)


def accuracy_by_confidence(path: Path, arms: Mapping[str, Numbers]) -> None:
    """Draw the accuracy of queries against their confidence; on the diagonal both agree."""
    title, x_label = "Accuracy by confidence", "confidence (largest probability)"
    figure, axes = _figure(title, x_label, "accuracy", x_format=_PERCENT, arms=len(arms))
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
    labels = []
    for (name, arm), color in _colored(arms):
        found = arm["calibration"]
        x, y = found["confidence"], found["accuracy"]
        axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=4)
        labels.append((y[-1], f"{name}  error {found['error']:.1%}", color))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _label_right(axes, labels)
    _save(figure, path)


def accuracy_by_class(path: Path, classes: Sequence[Numbers]) -> None:
    """Draw the accuracy of each class with its interval, the worst class first."""
    title, x_label = "Accuracy by class", "classes, the worst first"
    figure, axes = _figure(title, x_label, "accuracy", x_format=_COUNT)
    rank = np.arange(1, len(classes) + 1)
    found = [each["accuracy"] for each in classes]
    means, low, high = np.array([(each["mean"], *each["interval95"]) for each in found]).T
    axes.vlines(rank, low, high, color=_BARS, linewidth=min(6, 400 / len(classes)))
    axes.plot(rank, means, color=_MAIN, linestyle="", marker="o", markersize=4)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(round_ticks(1, len(classes), integer=True))
    _save(figure, path)


def learning_curve(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw the validation accuracy over the outer steps, with its best and last values.

    Each point is ``{"step": ..., "val_accuracy": ..., "val_ci95": ...}``; the half-width of the
    interval may be None or missing.
    """
    steps = np.array([point["step"] for point in points], dtype=np.float64)
    accuracy = np.array([point["val_accuracy"] for point in points], dtype=np.float64)
    margin = np.array([min(point.get("val_ci95") or 0.0, 1.0) for point in points])
    low, high = np.maximum(accuracy - margin, 0), np.minimum(accuracy + margin, 1)
    title = "Validation accuracy while learning"
    figure, axes = _figure(title, "outer steps", "mean accuracy", x_format=_COUNT)
    axes.fill_between(steps, low, high, color=_MAIN, alpha=0.18, linewidth=0)
    # A few points are drawn one by one; many would only thicken the line.
    axes.plot(steps, accuracy, color=_MAIN, linewidth=2, marker="o" if len(points) <= 40 else None)
    axes.margins(x=0.02, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_TICK_STEPS, integer=True))
    best, last = int(np.argmax(accuracy)), len(accuracy) - 1
    for index, name in {last: "last", best: "best"}.items():
        up = name == "best"
        _write(
            axes,
            f"{name} {accuracy[index]:.1%}",
            (steps[index], high[index] if up else low[index]),
            (0, 10 if up else -10),
            _MAIN,
            ha="right" if index > last / 2 else "left",
            va="bottom" if up else "top",
            fontsize=12,
            fontweight="bold" if up else "normal",
            bbox=_ON_WHITE,
        )
    _save(figure, path)


def bar_edges(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bin edges that hold equally many possible values each, over the range of the data.

    An episode with M query images has an accuracy of i/M; bins that ignore this draw a comb.
    The grid is read off the data: its step is the smallest gap between two values.
    """
    values = np.unique(np.round(accuracy, 6))
    step = float(np.diff(values).min()) if len(values) > 1 else 0.01
    # As the grid ends at 1, count bins down from there.
    width = step * math.ceil((1 - values[0] + step) / (step * _MAX_BARS))
    top = 1 + step / 2
    upper = top - width * math.floor((top - values[-1]) / width)
    num_bars = math.ceil((upper - values[0]) / width)
    return np.asarray(upper - width * np.arange(num_bars, -1, -1))


def spread_labels(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ``heights`` as little as possible (least squares) to be ``gap`` apart in low..high.

    Heights that are ``gap`` apart are heights minus ``gap`` times their rank that do not fall:
    an isotonic regression.
    """
    ranks = np.argsort(np.argsort(heights, kind="stable"), kind="stable")
    order = np.argsort(ranks)
    level = isotonic_regression(np.asarray(heights)[order] - gap * np.arange(len(heights))).x
    level = np.clip(level, low, high - gap * (len(heights) - 1))
    return [float(level[rank] + gap * rank) for rank in ranks]


def round_ticks(low: float, high: float, *, integer: bool = False) -> list[float]:
    """Return round positions in low..high; matplotlib's own go beyond 100% and the last step."""
    if low == high:
        return [low]
    locator = MaxNLocator(nbins=8, steps=_TICK_STEPS, integer=integer)
    slack = 1e-9  # positions are sums of rounded steps
    return [tick for tick in locator.tick_values(low, high) if low - slack <= tick <= high + slack]


def _figure(
    title: str,
    x: str,
    y: str = "",
    x_format: FuncFormatter | StrMethodFormatter | None = None,
    *,
    arms: int = 1,
) -> tuple[Figure, Axes]:
    """Return an empty figure; ``x`` and ``y`` name its axes, and ``y`` is in per cent. It is high
    enough for the labels of the ``arms``."""
    size = (_WIDTH, max(_HEIGHT, 1 + _ROW * arms))
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.set_xlabel(x, color=_INK, fontsize=12)
    axes.set_ylabel(y, color=_INK, fontsize=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(length=0, labelsize=11, labelcolor=_INK, pad=6)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(_PERCENT)
    if x_format is not None:
        axes.xaxis.set_major_formatter(x_format)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        # Without the version of matplotlib in it, equal pictures are equal files.
        figure.savefig(file, format="png", metadata={"Software": None})


def _colored(arms: Mapping[str, Arm]) -> Iterator[tuple[tuple[str, Arm], str]]:
    """Yield each arm with its colour; the first arm stands out."""
    return zip(arms.items(), itertools.chain([_MAIN], itertools.cycle(_OTHERS)), strict=False)


def _write(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    color: str,
    **style: Any,
) -> None:
    """Write ``text`` at an offset in points from a place of the data."""
    style = {"fontsize": 11, "parse_math": False, "textcoords": "offset points", **style}
    axes.annotate(text, at, xytext=offset, color=color, **style)


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each (height, text, colour) beside the right edge, none over another."""
    low, high = axes.get_ylim()
    inches = axes.get_window_extent().height / _DPI  # before the layout, which leaves fewer
    gap = (high - low) * 0.19 / inches
    placed = spread_labels([height for height, _, _ in labels], gap, low, high)
    for (_, text, color), height in zip(labels, placed, strict=True):
        _write(axes, text, (1, height), (10, 0), color, va="center", xycoords=_RIGHT_EDGE)
