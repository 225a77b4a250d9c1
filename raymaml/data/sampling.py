"""Episodes as row numbers of a bank: which images are drawn, and in which order they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.config.schema import AllEpisodes, EpisodesConfig, Split
from raymaml.data.bank import ImageBank
from raymaml.seeding import bit_stream, draw_without_replacement, fold_in

MAX_LISTED_PROBLEMS = 50


@dataclass(frozen=True, kw_only=True)
class EpisodeRows:
    """One episode as row numbers of a bank.

    The label of the class at position ``j`` of ``classes`` is ``j``. Support and query images stand
    in a random order of their labels, so that the place of an image says nothing about its class.
    """

    index: int
    seed: int
    classes: NDArray[np.int64]  # [N], ids of the bank's classes
    support: NDArray[np.int64]  # [N*K]
    support_labels: NDArray[np.int64]  # [N*K], in 0..N-1, each K times
    query: NDArray[np.int64]  # [N*Q]
    query_labels: NDArray[np.int64]  # [N*Q], in 0..N-1, each Q times


def sample_episode(
    bank: ImageBank, spec: EpisodesConfig, seed: int, split: str, index: int
) -> EpisodeRows:
    """Draw episode ``index``: N classes of ``split``, then K + Q distinct images of each.

    The classes and the support set do not depend on ``num_queries``: with another number, the
    same index keeps its task and support images, and their order.
    """
    bits = bit_stream(seed, "episode", split, index)
    ids = bank.class_ids(split)
    classes = ids[draw_without_replacement(bits, len(ids), spec.num_ways)]
    drawn = np.empty((spec.num_ways, spec.images_per_class), dtype=np.int64)
    for way, class_id in enumerate(classes.tolist()):
        first, count = bank.first_row[class_id], bank.classes[class_id].count
        drawn[way] = first + draw_without_replacement(bits, count, spec.images_per_class)
    shots = spec.num_shots
    support, support_labels = _shuffled(
        drawn[:, :shots], bit_stream(seed, "support-order", split, index)
    )
    query, query_labels = _shuffled(drawn[:, shots:], bit_stream(seed, "query-order", split, index))
    return EpisodeRows(
        index=index,
        seed=fold_in(seed, "episode-seed", split, index),
        classes=classes,
        support=support,
        support_labels=support_labels,
        query=query,
        query_labels=query_labels,
    )


def _shuffled(
    drawn: NDArray[np.int64], bits: np.random.Philox
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put rows [N, n] into a random order of their labels; return rows and labels [N*n].

    The rows of one class keep the order in which they were drawn, which is random already.
    """
    labels = draw_without_replacement(bits, drawn.size, drawn.size) // drawn.shape[1]
    rows = np.empty(drawn.size, dtype=np.int64)
    rows[np.argsort(labels, kind="stable")] = drawn.ravel()
    return rows, labels


def by_label(values: NDArray[Any], labels: NDArray[np.int64], num_ways: int) -> NDArray[Any]:
    """Group values [..., N*n] by their labels: [..., N, n], the order within a label kept."""
    order = np.argsort(labels, axis=-1, kind="stable")
    return np.take_along_axis(values, order, -1).reshape(*labels.shape[:-1], num_ways, -1)


def spec_in(bank: ImageBank, episodes: AllEpisodes, split: Split) -> EpisodesConfig:
    """Return the spec of a split's episodes, as ``fitted`` to the classes of ``bank``."""
    ids = bank.class_ids(split).tolist()
    return fitted(episodes, split, [bank.classes[i].count for i in ids])


def fitted(episodes: AllEpisodes, split: Split, sizes: Collection[int]) -> EpisodesConfig:
    """Return the spec of a split, with fewer queries where ``fit_queries`` asks for it.

    Args:
        episodes: of the config.
        split: whose spec it is.
        sizes: numbers of images of its classes. Where even the support set takes all of a class,
            the spec stays as it is, which ``fit_problems`` reports.
    """
    spec = episodes.of(split)
    most = min(sizes, default=0) - spec.num_shots
    if episodes.fit_queries and 0 < most < spec.num_queries:
        return spec.model_copy(update={"num_queries": most})
    return spec


def check_spec(bank: ImageBank, spec: EpisodesConfig, split: str) -> None:
    """Check that the bank can give episodes of ``spec``.

    Raises:
        UserError: naming each class or split that is too small.
    """
    counts = {bank.classes[i].name: bank.classes[i].count for i in bank.class_ids(split).tolist()}
    if problems := fit_problems(spec, split, counts):
        raise UserError(*listed(problems))


def fit_problems(
    spec: EpisodesConfig, split: str, counts: Mapping[str, int], share: str = ""
) -> list[str]:
    """Return the reasons why classes of these sizes cannot give episodes of ``spec``.

    Args:
        spec: of the episodes.
        split: of the classes.
        counts: the classes with their numbers of images.
        share: the option that decides how many classes the split gets, if one does.
    """
    problems = []
    if len(counts) < spec.num_ways:
        problems.append(
            f"split {split}: has {len(counts)} classes, episodes.{split}.num_ways is"
            f" {spec.num_ways}; add classes or lower it"
            + (f", or give the split a larger share by {share}" if share else "")
        )
    small = {name: n for name, n in sorted(counts.items()) if n < spec.images_per_class}
    if small:
        least = min(small, key=lambda name: small[name])
        queries = small[least] - spec.num_shots  # that would fit all classes
        remedy = f"set episodes.{split}.num_queries to {queries}" if queries > 0 else "lower them"
        problems.append(
            f"split {split}: {len(small):,} of {len(counts):,} classes"
            f" {'has' if len(small) == 1 else 'have'} fewer images than num_shots + num_queries ="
            f" {spec.images_per_class} of episodes.{split}; the fewest are {small[least]}, of class"
            f" {least}; add images, leave these classes out, or {remedy}"
        )
    return problems


def listed(problems: Sequence[str]) -> list[str]:
    """Return the first problems of a long list, each once, and the number of the others."""
    different = list(dict.fromkeys(problems))
    hidden = len(different) - MAX_LISTED_PROBLEMS
    more = [f"... and {hidden} more problems like these"] if hidden > 0 else []
    return different[:MAX_LISTED_PROBLEMS] + more
