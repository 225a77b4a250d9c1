"""Paired comparisons: on the same episodes or not at all."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers_evaluation import arrays, record
from scipy import stats

from raymaml.common.errors import UserError
from raymaml.evaluation.paired import paired
from raymaml.evaluation.record_files import read_records, write_chunk
from raymaml.evaluation.records import RecordArrays, record_arrays
from raymaml.statistics.intervals import bounded_interval
from raymaml.statistics.significance import holm, signed_rank_p

NAMES = ("one", "other")


def arm(folder: Path, name: str, accuracy: list[float]) -> RecordArrays:
    path = folder / name / "chunk.parquet"
    records = [record(i, accuracy_by_step=(value,)) for i, value in enumerate(accuracy)]
    write_chunk(path, records, {})
    return record_arrays(read_records(path.parent))


def test_differences_by_hand(tmp_path: Path) -> None:
    a = arm(tmp_path, "a", [0.5, 0.75, 0.5, 1.0, 0.5])
    b = arm(tmp_path, "b", [0.25, 0.5, 0.5, 0.5])  # episode 4 was not judged
    found = paired(a, b, NAMES)
    assert found.difference.count == 4
    assert found.difference.mean == 0.25  # (0.25 + 0.25 + 0 + 0.5) / 4
    assert found.difference == bounded_interval(np.array([0.25, 0.25, 0, 0.5]), lowest=-1.0)
    assert (found.wins, found.ties, found.losses) == (3, 1, 0)
    assert found.sign_p == pytest.approx(2 / 2**3)
    assert found.wilcoxon_p == pytest.approx(2 / 2**3)  # all three ranks are on one side


QUERY = ("query_rows", "query_labels")


@pytest.mark.parametrize(("queries", "episodes"), [(5, 40), (75, 600)])
def test_p_values_are_those_of_whole_queries(queries: int, episodes: int) -> None:
    # As floats, 3/5 - 2/5 and 2/5 - 1/5 are two numbers, and no tie.
    generator = np.random.default_rng([queries, episodes])
    right = generator.binomial(queries, [[0.55], [0.45]], (2, episodes))
    rows = np.zeros((episodes, queries), dtype=np.int64)
    for kind in (np.float64, np.float32):
        a, b = (arrays((count / queries).astype(kind), rows) for count in right)
        found = paired(a, b, NAMES)
        counts = right[0] - right[1]
        wins, losses = int((counts > 0).sum()), int((counts < 0).sum())
        assert found.wilcoxon_p == signed_rank_p(counts)
        assert found.sign_p == stats.binomtest(wins, wins + losses).pvalue
        assert (found.wins, found.losses) == (wins, losses)
        assert found.difference.mean == pytest.approx(counts.mean() / queries, abs=1e-12)


@pytest.mark.parametrize("size", [3, 8, 14])
def test_wilcoxons_p_is_that_of_all_choices_of_signs(size: int) -> None:
    generator = np.random.default_rng(size)
    for _ in range(5):
        sizes = generator.integers(1, 5, size)  # ties of several sizes
        signs = generator.choice([-1, 1], size)
        # the mean of the first and the last place that a size has, in order
        order = sorted(sizes)
        last = [size - order[::-1].index(x) for x in sizes]
        ranks = np.array(
            [(order.index(x) + 1 + end) / 2 for x, end in zip(sizes, last, strict=True)]
        )
        every = np.array(list(product((-1, 1), repeat=size))) @ ranks
        expected = np.mean(np.abs(every) >= abs(signs @ ranks))
        assert signed_rank_p(np.array([*(signs * sizes), 0, 0])) == pytest.approx(expected)


def test_wilcoxons_p_of_many_differences_is_that_of_a_normal_distribution() -> None:
    generator = np.random.default_rng(0)
    for count in (200, 201):
        differences = generator.integers(1, 5, count) * generator.choice(
            [-1, 1], count, p=[0.45, 0.55]
        )
        usual = stats.wilcoxon(differences, method="asymptotic").pvalue
        found = signed_rank_p(np.array([*differences, 0]))
        assert found == pytest.approx(usual, rel=0.05)
        assert (found == usual) == (count > 200)


def test_arms_of_other_numbers_of_queries_are_counted_by_a_common_one() -> None:
    # 2 of 3 is more than 3 of 5 by 1/15, 1 of 3 less than 2 of 5 by as much
    three, five = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 5), dtype=np.int64)
    a, b = arrays(np.array([2, 1]) / 3, three), arrays(np.array([3, 2]) / 5, five)
    one = np.zeros((2, 1), dtype=np.int64)  # way, and shot
    a, b = (
        replace(each, class_ids=one, support_rows=one, support_labels=one, query_labels=rows)
        for each, rows in ((a, three), (b, five))
    )
    found = paired(a, b, NAMES)
    assert (found.wins, found.ties, found.losses) == (1, 0, 1)
    assert found.difference.mean == 0
    assert found.wilcoxon_p == 1


def test_equal_arms_do_not_differ(tmp_path: Path) -> None:
    a = arm(tmp_path, "a", [0.5, 0.75])
    found = paired(a, a, NAMES)
    # Of two episodes that are alike nothing much is known: 1 - 0.025^(1/2) may differ by 1.
    assert (found.difference.mean, found.difference.half_width) == (0, pytest.approx(0.841886))
    assert (found.ties, found.sign_p, found.wilcoxon_p) == (2, 1, 1)


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("class_ids", "classes"),
        ("support_rows", "support images"),
        ("support_labels", "support labels"),
        ("query_rows", "query images"),
    ],
)
def test_other_episodes_are_refused(tmp_path: Path, column: str, what: str) -> None:
    a = arm(tmp_path, "a", [0.5, 0.75, 1.0])
    changed = getattr(a, column).copy()
    changed[1:, 2] += 1
    with pytest.raises(UserError, match=f"one and other: episode 1 has other {what} in one"):
        paired(a, replace(a, **{column: changed}), NAMES)
    fewer = {column: changed[:, :4]}
    if column == "query_rows":  # the last two of the three of each class
        fewer = {name: getattr(a, name).reshape(3, 5, 3)[..., 1:].reshape(3, 10) for name in QUERY}
    with pytest.raises(UserError, match=f"episode 0 has other {what}"):
        paired(a, replace(a, **fewer), NAMES)


def test_other_banks_and_no_common_episode_are_refused(tmp_path: Path) -> None:
    # mini-ImageNet and CIFAR-FS have 100 classes of 600 images each: one seed, the same rows
    a = arm(tmp_path, "a", [0.5, 0.75])
    with pytest.raises(UserError, match=r"different banks \(aaaaaaaaaaaa and b\)"):
        paired(replace(a, bank="a" * 64), replace(a, bank="b"), NAMES)
    with pytest.raises(UserError, match="no episode in common"):
        paired(a, replace(a, episode=a.episode + 2), NAMES)


def test_the_difference_has_an_interval_for_new_classes(tmp_path: Path) -> None:
    # What decides the difference is one class: of others less is known than of other episodes.
    generator = np.random.default_rng(8)
    rows = np.argsort(generator.random((600, 12)), 1)[:, :3]
    better = 0.3 * (rows == 0).any(1) + generator.normal(0, 0.01, 600)
    found = paired(arrays(0.5 + better, rows), arrays(np.full(600, 0.5), rows), NAMES)
    assert found.new_classes.mean == pytest.approx(found.difference.mean)
    assert found.difference.low > 0 > found.new_classes.low
    assert found.new_classes.count == 12


@pytest.mark.parametrize(("count", "enough"), [(2, False), (59, False), (60, True)])
def test_few_episodes_allow_no_verdict(tmp_path: Path, count: int, enough: bool) -> None:
    a, b = arm(tmp_path, "a", [0.8] * count), arm(tmp_path, "b", [0.6] * count)
    found = paired(a, b, NAMES)
    # all differences are equal; of two episodes the interval says nearly nothing all the same
    assert found.difference.low < 0.2 < found.difference.high
    assert found.allows_a_verdict == enough
    if count == 2:
        assert found.difference.low < 0
        assert found.sign_p == found.wilcoxon_p == 0.5


def test_fewer_queries_of_the_same_episodes_are_compared(tmp_path: Path) -> None:
    a = arm(tmp_path, "a", [0.5, 0.75])

    def chosen(number: int, order: list[int]) -> RecordArrays:
        """Of each class the image of this number, the classes in this order."""
        apart = {name: getattr(a, name).reshape(2, 5, 3)[:, order, number] for name in QUERY}
        return replace(a, **apart)

    assert paired(a, chosen(0, [0, 1, 2, 3, 4]), NAMES).ties == 2
    assert paired(a, chosen(0, [3, 0, 4, 1, 2]), NAMES).ties == 2
    with pytest.raises(UserError, match="other query images"):
        paired(a, chosen(1, [0, 1, 2, 3, 4]), NAMES)


def test_holm_by_hand_and_as_statsmodels_to_the_bit() -> None:
    # 0.01 * 3; 0.02 * 2 = 0.04; 0.5
    assert holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    # statsmodels 0.15.0, multipletests(p, method="holm")[1]; with ties, and products above 1
    p_values = [0.3, 0.011, 0.04, 0.0007, 0.04, 0.012, 0.9, 0.31]
    adjusted = [0.8999999999999999, 0.077, 0.2, 0.0056, 0.2, 0.077, 0.9, 0.8999999999999999]
    assert holm(p_values) == adjusted
