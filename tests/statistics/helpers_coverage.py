"""Simulated coverage of intervals over episodes; run as a script, it draws the picture of
raymaml/evaluation/README.md::

PYTHONPATH=. python tests/statistics/helpers_coverage.py raymaml/evaluation/coverage.png
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from raymaml.statistics.intervals import bounded_ends, degrees_of_freedom

ACCURACIES = (0.5, 0.8, 0.95, 0.98, 0.99, 0.998, 0.999, 0.9999)
QUERIES = (5, 15, 75)
EPISODES = (2, 5, 10, 20, 40, 100, 600, 6000)
SPREADS = (0.0, 0.05, 0.3)
"""Correlation of two queries of one episode; 0.05 is usual, 0.3 a heavy tail of bad episodes."""
CAMPAIGNS = 2_000
ERROR = (0.05 * 0.95 / CAMPAIGNS) ** 0.5
"""Standard deviation of a simulated coverage of 95%: 0.49%."""
DIFFERENCES = ((0.2, 0.1), (0.02, 0.01), (0.002, 0.001), (0.001, 0.001), (0.0002, 0.0))
"""Chances that one arm alone is right at a query, and that the other is."""


@dataclass(frozen=True)
class Cell:
    """What some campaigns of one kind gave."""

    name: str
    covered: float
    covered_by_t: float
    width_ratio: float
    """Mean width against that of the t interval."""


def accuracy_chances(accuracy: float, queries: int, spread: float) -> NDArray[np.float64]:
    """Chances of 0, 1, .. right queries in an episode: binomial, or beta-binomial."""
    right = np.arange(queries + 1)
    if spread == 0:
        return stats.binom.pmf(right, queries, accuracy)
    size = 1 / spread - 1
    return stats.betabinom.pmf(right, queries, accuracy * size, (1 - accuracy) * size)


def difference_chances(win: float, loss: float, queries: int) -> NDArray[np.float64]:
    """Chances of differences -Q..Q of right queries."""
    single = np.array([loss, 1 - win - loss, win])
    return functools.reduce(np.convolve, [single] * queries)


def simulate(
    name: str,
    values: NDArray[np.float64],
    chances: NDArray[np.float64],
    episodes: int,
    generator: np.random.Generator,
) -> Cell:
    """Judge CAMPAIGNS campaigns of episodes that have these values in 0..1, by the moments."""
    chances = chances / chances.sum()
    drawn = generator.multinomial(episodes, chances, CAMPAIGNS)  # [C, V]
    equal = (drawn == episodes).any(1)
    mean = np.where(equal, values[drawn.argmax(1)], drawn @ values / episodes)
    second, fourth = (
        np.where(equal, 0, np.sum((values - mean[:, None]) ** power * drawn, 1) / episodes)
        for power in (2, 4)
    )
    error = np.sqrt(second / (episodes - 1))
    low, high = bounded_ends(mean, error, degrees_of_freedom(episodes, second, fourth), episodes)
    margin = special.stdtrit(episodes - 1, 0.975) * error
    t_low, t_high = np.maximum(mean - margin, 0), np.minimum(mean + margin, 1)
    truth, slack = float(chances @ values), 1e-12
    return Cell(
        name=name,
        covered=float(np.mean((low <= truth + slack) & (truth <= high + slack))),
        covered_by_t=float(np.mean((t_low <= truth + slack) & (truth <= t_high + slack))),
        width_ratio=float((high - low).mean() / max((t_high - t_low).mean(), slack)),
    )


def accuracy_cell(accuracy: float, queries: int, episodes: int, spread: float) -> Cell:
    """Simulate campaigns of one kind."""
    key = [round(1e6 * accuracy), queries, episodes, round(100 * spread)]
    return simulate(
        f"{accuracy:.2%}, {queries} queries, {episodes} episodes, spread {spread}",
        np.arange(queries + 1) / queries,
        accuracy_chances(accuracy, queries, spread),
        episodes,
        np.random.default_rng(key),
    )


def difference_cell(win: float, loss: float, queries: int, episodes: int) -> Cell:
    """Simulate paired campaigns of one kind; differences -1..1 are shown as 0..1."""
    return simulate(
        f"{win} - {loss}, {queries} queries, {episodes} episodes",
        np.arange(2 * queries + 1) / (2 * queries),
        difference_chances(win, loss, queries),
        episodes,
        np.random.default_rng([round(1e6 * win), round(1e6 * loss), queries, episodes]),
    )


def draw(path: Path, spread: float = 0.05) -> None:
    """Draw the coverage of the t interval and of ours, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), dpi=60, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, queries in zip(grid, (5, 75), strict=True):
        for axes, name, which in zip(
            row, ("Student's t", "raymaml"), ("covered_by_t", "covered"), strict=True
        ):
            axes.axhline(0.95, color="0.3", linewidth=1, linestyle="--")
            for shade, episodes in enumerate(EPISODES):
                found = [accuracy_cell(a, queries, episodes, spread) for a in ACCURACIES]
                axes.plot(
                    [f"{100 * a:g}%" for a in ACCURACIES],
                    [getattr(cell, which) for cell in found],
                    color=str(0.75 - 0.1 * shade),
                    marker="o",
                    markersize=3,
                    label=f"{episodes:,} episodes",
                )
            axes.set_title(f"{name}, {queries} queries", loc="left", fontsize=11)
            axes.set_ylim(0, 1.02)
    grid[1][0].legend(fontsize=8, loc="lower left")
    figure.supylabel("campaigns whose 95% interval covers the accuracy")
    figure.supxlabel("true accuracy")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
