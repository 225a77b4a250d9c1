"""Sampling: an episode is as defined, uniform, and a function of its name alone."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from helpers_data import as_lists, make_bank, spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from raymaml.config.schema import AllEpisodes
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import by_label, fitted, sample_episode

COUNTS = {"train": [20] * 12, "val": [20] * 5, "test": [20] * 6}
RECORDED = [
    *(41, 2401375900870217655, [7, 10, 6]),
    *([216, 129, 143], [1, 2, 0]),
    *([200, 132, 148, 213, 121, 140], [1, 2, 0, 1, 2, 0]),
]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    return make_bank(tmp_path_factory.mktemp("sampling") / "bank", COUNTS)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_episode_is_as_defined(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ways, shots, queries = (data.draw(st.integers(low, 6)) for low in (2, 1, 1))
    sizes = st.integers(shots + queries, 30)
    counts = data.draw(st.lists(sizes, min_size=ways, max_size=40))
    folder = tmp_path_factory.mktemp("any") / "bank"
    any_bank = make_bank(folder, {"train": [1, 2], "val": counts}, size=1)
    spec = spec_of(ways, shots, queries, 1)
    seed, index = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 10**9))
    rows = sample_episode(any_bank, spec, seed, "val", index)

    assert len(set(rows.classes.tolist())) == ways, "a class repeats"
    assert {any_bank.classes[c].split for c in rows.classes.tolist()} == {"val"}
    assert rows.support.shape == (ways * shots,)
    assert rows.query.shape == (ways * queries,)
    images = [*rows.support.tolist(), *rows.query.tolist()]
    assert len(set(images)) == len(images), "an image repeats"
    owners = np.searchsorted(any_bank.first_row, rows.support, side="right") - 1
    np.testing.assert_array_equal(owners, rows.classes[rows.support_labels])
    owners = np.searchsorted(any_bank.first_row, rows.query, side="right") - 1
    np.testing.assert_array_equal(owners, rows.classes[rows.query_labels])
    for labels, each in ((rows.support_labels, shots), (rows.query_labels, queries)):
        assert np.bincount(labels, minlength=ways).tolist() == [each] * ways


def test_an_episode_has_these_very_rows_for_ever(bank: ImageBank) -> None:
    """Recorded once: a change of these numbers makes every published seed worthless."""
    rows = sample_episode(bank, spec_of(3, 1, 2, 1), 7, "train", 41)
    assert as_lists(rows) == RECORDED


def lists_of(folder: Path, index: int) -> list[object]:
    return as_lists(sample_episode(ImageBank.open(folder), spec_of(3, 2, 4, 1), 5, "test", index))


def test_episodes_do_not_depend_on_history_or_process(
    bank: ImageBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {index: lists_of(bank.folder, index) for index in (3, 0, 9)}
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        there = {index: pool.submit(lists_of, bank.folder, index).result() for index in (9, 3, 0)}
    assert there == here


def test_seed_split_and_index_name_different_episodes(bank: ImageBank) -> None:
    spec = spec_of(5, 1, 15, 1)
    named = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    episodes = [sample_episode(bank, spec, *name) for name in named]
    assert len({episode.seed for episode in episodes}) == 4
    assert len({tuple(episode.query.tolist()) for episode in episodes}) == 4


def test_the_support_set_does_not_depend_on_the_number_of_queries(bank: ImageBank) -> None:
    few, many = (sample_episode(bank, spec_of(4, 3, q, 1), 0, "train", 8) for q in (1, 17))
    np.testing.assert_array_equal(few.classes, many.classes)
    np.testing.assert_array_equal(few.support, many.support)
    np.testing.assert_array_equal(few.support_labels, many.support_labels)
    first, drawn = (by_label(rows.query, rows.query_labels, 4) for rows in (few, many))
    np.testing.assert_array_equal(first, drawn[:, :1])


def test_the_place_of_an_image_says_nothing_about_its_label(bank: ImageBank) -> None:
    """Chi-square tests over 2,000 episodes of 3 ways, 2 shots, 2 queries, and of neighbours.

    At every place each label comes with probability 1/3; two neighbours agree with probability
    1/5, since 1 of the 5 other images has the label of the first.
    """
    rows = [sample_episode(bank, spec_of(3, 2, 2, 1), 4, "train", index) for index in range(2_000)]
    for labels in (
        np.stack([each.support_labels for each in rows]),
        np.stack([each.query_labels for each in rows]),
    ):
        counts = np.stack([(labels == label).sum(0) for label in range(3)])  # [3, places]
        assert stats.chisquare(counts).pvalue.min() > 1e-4
        alike = (labels[:, 1:] == labels[:, :-1]).sum(0)
        assert np.abs(alike / 2_000 - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / 2_000)
    together = [(a.support_labels == a.query_labels).mean() for a in rows]
    assert abs(np.mean(together) - 1 / 3) < 0.02, "support and query share one order"


def test_classes_and_images_are_drawn_uniformly(bank: ImageBank) -> None:
    """Chi-square tests of 3,000 draws of 5 of 12 classes and of 5 of 20 images.

    A draw of n of m without replacement varies less than n independent draws, by the factor
    (m - n) / (m - 1); the statistic is scaled up by its inverse.
    """
    ways, drawn, episodes = 5, 5, 3000
    spec = spec_of(ways, 2, drawn - 2, 1)
    classes, images, first, support = np.zeros(12), np.zeros(20), np.zeros(12), np.zeros(20)
    for index in range(episodes):
        rows = sample_episode(bank, spec, 0, "train", index)
        classes += np.bincount(rows.classes, minlength=12)
        first += np.bincount(rows.classes[:1], minlength=12)
        support += np.bincount(rows.support % 20, minlength=20)
        images += np.bincount(np.concatenate([rows.support, rows.query]) % 20, minlength=20)

    assert classes.sum() == ways * episodes
    assert images.sum() == ways * drawn * episodes
    for counts, taken in ((classes, ways), (first, 1), (images, drawn), (support, 2)):
        kinds = len(counts)
        statistic = stats.chisquare(counts).statistic * (kinds - 1) / (kinds - taken)
        assert 0.001 < stats.chi2.sf(statistic, kinds - 1) < 0.999


@pytest.mark.parametrize(
    ("fit", "sizes", "queries"),
    [
        (True, [9, 7, 6], 5),  # 6 images are enough for 1 shot and 5 queries
        (True, [9, 7, 4], 3),
        (True, [9, 2], 1),
        (True, [9, 1], 5),  # no query is left: ``fit_problems`` says so
        (True, [], 5),
        (False, [9, 4], 5),
    ],
)
def test_queries_fit_the_smallest_class_where_asked(
    fit: bool, sizes: list[int], queries: int
) -> None:
    spec = spec_of(5, 1, 5, 10)
    episodes = AllEpisodes(train=spec, val=spec, test=spec, fit_queries=fit)
    assert fitted(episodes, "train", sizes) == spec_of(5, 1, queries, 10)
