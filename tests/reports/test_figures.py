"""Bars, labels and ticks of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raymaml.reports import figures
from raymaml.reports.figures import bar_edges, round_ticks, spread_labels


@pytest.mark.parametrize("num_images", [1, 3, 5, 75, 100, 375, 2000])
def test_bars_hold_every_episode_and_equally_many_values(num_images: int) -> None:
    counts = np.arange(num_images // 3, num_images + 1)
    accuracy = np.repeat(counts, 2) / num_images
    edges = bar_edges(accuracy)
    held = np.histogram(accuracy, edges)[0]
    assert held.sum() == len(accuracy)
    assert len(held) <= 81
    # Every possible value is there twice: a comb would show as bars of different height. Only
    # the lowest bar may reach below the data.
    assert set(held[1:]) <= {held[-1]}
    assert held[0] <= held[-1]


@pytest.mark.parametrize("accuracy", [0.0, 0.2, 1.0])
def test_bars_of_one_value(accuracy: float) -> None:
    edges = bar_edges(np.full(5, accuracy))
    assert len(edges) == 2
    assert edges[0] < accuracy < edges[1]


def test_labels_are_spread_by_moving_them_as_little_as_possible() -> None:
    assert spread_labels([0.2, 0.9], 0.1, 0, 1) == pytest.approx([0.2, 0.9])
    # Two at one height part evenly; the third is far enough off.
    assert spread_labels([0.5, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.45, 0.55, 0.9])
    # In the order given, and inside: 1.0 and 0.98 become 1.0 and 0.9.
    assert spread_labels([1.0, 0.98], 0.1, 0, 1) == pytest.approx([1.0, 0.9])
    assert spread_labels([0.0, 0.01], 0.1, 0, 1) == pytest.approx([0.0, 0.1])


def test_ticks_are_round_and_inside() -> None:
    assert round_ticks(0.527, 1.0) == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert round_ticks(0, 1, integer=True) == [0, 1]
    assert round_ticks(0, 5, integer=True) == [0, 1, 2, 3, 4, 5]
    assert round_ticks(0, 0, integer=True) == [0]  # arms without inner steps


def test_many_arms_with_long_names_fit(tmp_path: Path) -> None:
    """Matplotlib warns, which is an error here, where labels leave no room; 40 rows are 14.6 in."""
    number = {"mean": 0.3, "interval95": (0.2, 0.4), "ci95": 0.1}
    calibration = {"confidence": [0.1, 0.9], "accuracy": [0.2, 0.3], "error": 0.1}
    arm = {
        "accuracy": {**number, "new_classes": number},
        "accuracy_by_step": [number, number],
        "calibration": calibration,
    }
    arms = {f"a-member-with-a-long-name-seed{seed}": arm for seed in range(40)}
    figures.accuracy_by_step(tmp_path / "steps.png", arms, 0.2)
    figures.mean_accuracies(tmp_path / "means.png", arms)
    figures.accuracy_by_confidence(tmp_path / "confidence.png", arms)
    figures.running_mean(tmp_path / "running.png", dict.fromkeys(arms, np.array([0.2, 0.4])))
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (1152, round(160 * 14.6))
