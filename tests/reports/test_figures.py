"""Bars, labels and ticks of the figures."""

from __future__ import annotations

import numpy as np
import pytest

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
