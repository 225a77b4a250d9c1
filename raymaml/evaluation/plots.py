"""The pictures of a report: PNG files, drawn without any global state of matplotlib.

Accuracies come in 0..1 and are drawn in per cent. Equal input gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from raymaml.evaluation.statistics import Interval
from raymaml.evaluation.summary import Calibration
from raymaml.storage.files import replacing

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

_SIZE = (7.2, 4.05)  # inches; 1152 x 648 pixels
_DPI = 160
_INK, _MUTED, _GRID = "#24292f", "#6e7781", "#e4e7eb"
_MAIN = "#1f6feb"
_OTHERS = ("#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_BARS = "#b3cff8"
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # covers the grid behind
_MAX_BARS = 80
_TICK_STEPS = [1, 2, 2.5, 5, 10]
# Not PercentFormatter: it writes 60.0% for 60% when the axis is shorter than 50%.
_PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")


def plot_distribution(path: Path, accuracy: NDArray[np.float64], mean: Interval) -> None:
    """Draw how ``accuracy`` [E] is spread over episodes, its mean and the interval of the mean."""
    edges = bar_edges(accuracy)
    shares = np.histogram(accuracy, edges)[0] / len(accuracy)
    figure, axes = _figure(f"Accuracy of {len(accuracy):,} episodes")
    axes.bar(edges[:-1], shares, np.diff(edges) * 0.92, align="edge", color=_BARS)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks(round_ticks(edges[0], min(edges[-1], 1.0)))
    axes.set_ylim(0, shares.max() * 1.25)  # the label of the mean stands above the bars
    axes.set_xlabel("accuracy of an episode", color=_INK)
    axes.set_ylabel("share of episodes", color=_INK)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _mark_mean(axes, mean)
    _save(figure, path)


def plot_accuracy_by_step(
    path: Path, arms: Mapping[str, Sequence[Interval]], chance: float
) -> None:
    """Draw the mean accuracy of each arm after 0..T inner steps; the first arm stands out.

    An arm that takes fewer steps than another goes on as a dotted line: it stays where it is.
    """
    last_step = max(len(intervals) for intervals in arms.values()) - 1
    right = max(last_step, 1)
    figure, axes = _figure("Accuracy by inner step")
    axes.axhline(chance, color=_MUTED, linewidth=1, zorder=1)
    labels = [(chance, f"chance  {chance:.1%}", _MUTED)]
    for (name, intervals), color in zip(arms.items(), _colors(len(arms)), strict=True):
        _draw_arm(axes, intervals, right, color)
        labels.append((intervals[-1].mean, f"{name}  {intervals[-1].mean:.1%}", color))
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("inner steps", color=_INK)
    axes.set_ylabel("mean accuracy", color=_INK)
    axes.set_xticks(round_ticks(0, last_step, integer=True))
    axes.yaxis.set_major_formatter(_PERCENT)
    _label_right(axes, labels)
    _save(figure, path)


def plot_arms(path: Path, arms: Mapping[str, tuple[Interval, Interval]]) -> None:
    """Draw the mean of each arm with its intervals over episodes (thick) and for new classes."""
    figure, axes = _figure("Mean accuracy of the arms")
    ends = []
    for place, ((name, (episodes, classes)), color) in enumerate(
        zip(arms.items(), _colors(len(arms)), strict=True)
    ):
        for interval, width in ((classes, 1.5), (episodes, 6)):
            if math.isfinite(interval.half_width):
                axes.plot(
                    [interval.low, interval.high],
                    [place, place],
                    color=color,
                    linewidth=width,
                    solid_capstyle="butt",
                )
                ends += [interval.low, interval.high]
        axes.plot([episodes.mean], [place], color=color, marker="o", markersize=7)
        ends.append(episodes.mean)
        axes.annotate(
            f"{name}  {episodes.mean:.2%}",
            (episodes.mean, place),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=11,
            color=color,
            parse_math=False,
        )
    room = 0.25 * (max(ends) - min(ends)) + 0.005
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(arms) - 0.5, -0.8)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x", color=_GRID, linewidth=1)
    axes.set_xlabel("thick: 95% interval over episodes; thin: for new classes", color=_INK)
    axes.xaxis.set_major_formatter(_PERCENT)
    _save(figure, path)


def plot_running_mean(
    path: Path,
    arms: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]],
    first: int,
) -> None:
    """Draw mean, low and high [n] over the first 1, 2, .. n episodes; ``first`` is marked."""
    figure, axes = _figure("Mean accuracy over the first episodes")
    count = max(len(means) for means, _, _ in arms.values())
    labels, lowest, highest = [], [], []
    for (name, (means, low, high)), color in zip(arms.items(), _colors(len(arms)), strict=True):
        # a few hundred points look like all of them, and draw in a blink
        at = np.unique(np.geomspace(min(10, len(means)), len(means), 400).astype(int)) - 1
        axes.fill_between(at + 1, low[at], high[at], color=color, alpha=0.15, linewidth=0)
        axes.plot(at + 1, means[at], color=color, linewidth=1.5)
        labels.append((float(means[-1]), f"{name}  {means[-1]:.1%}", color))
        late = at[at >= len(means) // 50]
        lowest.append(low[late].min())
        highest.append(high[late].max())
    axes.set_ylim(max(min(lowest) - 0.01, -0.02), min(max(highest) + 0.01, 1.02))
    axes.set_xlim(0, max(count, 2))
    if first < count:
        axes.axvline(first, color=_MUTED, linewidth=1, linestyle="--")
        axes.annotate(
            f"first {first}",
            (first, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=_MUTED,
            fontsize=11,
        )
    axes.set_xlabel("episodes", color=_INK)
    axes.set_ylabel("mean accuracy", color=_INK)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(_PERCENT)
    _label_right(axes, labels)
    _save(figure, path)


def plot_calibration(path: Path, arms: Mapping[str, Calibration]) -> None:
    """Draw the accuracy of queries against their confidence; on the diagonal both agree."""
    figure, axes = _figure("Accuracy by confidence")
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
    labels = []
    for (name, found), color in zip(arms.items(), _colors(len(arms)), strict=True):
        axes.plot(
            found.confidence, found.accuracy, color=color, linewidth=2, marker="o", markersize=4
        )
        labels.append((found.accuracy[-1], f"{name}  error {found.error:.1%}", color))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence (largest probability)", color=_INK)
    axes.set_ylabel("accuracy", color=_INK)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _label_right(axes, labels)
    _save(figure, path)


def plot_learning_curve(path: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """Draw the validation accuracy over the outer steps; its best and last values are named.

    Each point is ``{"step": ..., "val_accuracy": ..., "val_ci95": ...}``; the half-width of the
    interval may be None or missing.
    """
    steps = np.array([point["step"] for point in curve], dtype=np.float64)
    accuracy = np.array([point["val_accuracy"] for point in curve], dtype=np.float64)
    margin = np.array([min(point.get("val_ci95") or 0.0, 1.0) for point in curve])
    figure, axes = _figure("Validation accuracy while learning")
    axes.fill_between(
        steps,
        np.maximum(accuracy - margin, 0),
        np.minimum(accuracy + margin, 1),
        color=_MAIN,
        alpha=0.18,
        linewidth=0,
    )
    # A few points are drawn one by one; many would only thicken the line.
    axes.plot(steps, accuracy, color=_MAIN, linewidth=2, marker="o" if len(curve) <= 40 else None)
    axes.set_xlabel("outer steps", color=_INK)
    axes.set_ylabel("mean accuracy", color=_INK)
    axes.margins(x=0.02, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_TICK_STEPS, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(_PERCENT)
    _mark_best_and_last(axes, steps, accuracy, margin)
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


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(length=0, labelsize=11, labelcolor=_INK, pad=6)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        # Without the version of matplotlib in it, equal pictures are equal files.
        figure.savefig(file, format="png", metadata={"Software": None})


def _colors(count: int) -> list[str]:
    return [_MAIN, *(_OTHERS[index % len(_OTHERS)] for index in range(count - 1))]


def _mark_mean(axes: Axes, mean: Interval) -> None:
    text = f"mean {mean.mean:.2%} {PLUS_MINUS} {mean.half_width:.2%}\n(95% interval)"
    # Of a handful of episodes the interval is far wider than the picture.
    left, right = np.clip([mean.low, mean.high], *axes.get_xlim())
    axes.axvspan(left, right, color=_INK, alpha=0.15, lw=0)
    axes.axvline(mean.mean, color=_INK, linewidth=2)
    on_left = mean.mean > sum(axes.get_xlim()) / 2
    axes.annotate(
        text,
        (left if on_left else right, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-8 if on_left else 8, 0),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="top",
        fontsize=12,
        fontweight="bold",
        color=_INK,
        bbox=_ON_WHITE,
    )


def _draw_arm(axes: Axes, intervals: Sequence[Interval], right: int, color: str) -> None:
    steps = np.arange(len(intervals))
    means = np.array([interval.mean for interval in intervals])
    ends = np.array([(interval.low, interval.high) for interval in intervals])
    axes.fill_between(steps, *ends.T, color=color, alpha=0.2, linewidth=0)
    # Not clipped: the last marker stands on the right edge.
    axes.plot(steps, means, color=color, linewidth=2, marker="o", markersize=5, clip_on=False)
    axes.plot([steps[-1], right], [means[-1]] * 2, color=color, linewidth=1.5, linestyle=":")


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each (height, text, colour) beside the right edge, none over another."""
    low, high = axes.get_ylim()
    placed = spread_labels([height for height, _, _ in labels], (high - low) * 0.06, low, high)
    for (_, text, color), height in zip(labels, placed, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            color=color,
            parse_math=False,
        )


def _mark_best_and_last(
    axes: Axes,
    steps: NDArray[np.float64],
    accuracy: NDArray[np.float64],
    margin: NDArray[np.float64],
) -> None:
    """Write the best value above its interval and the last one below."""
    best, last = int(np.argmax(accuracy)), len(accuracy) - 1
    names = {last: "last", best: "best"} if best != last else {last: "best"}
    for index, name in names.items():
        sign = 1 if name == "best" else -1
        axes.annotate(
            f"{name} {accuracy[index]:.1%}",
            (steps[index], float(np.clip(accuracy[index] + sign * margin[index], 0, 1))),
            xytext=(0, 10 * sign),
            textcoords="offset points",
            ha="right" if index > last / 2 else "left",
            va="bottom" if name == "best" else "top",
            fontsize=12,
            fontweight="bold" if name == "best" else "normal",
            color=_MAIN,
            bbox=_ON_WHITE,
        )
