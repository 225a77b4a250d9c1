"""Judging a learner on episodes: one record each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.data.sampling import EpisodeRows
from raymaml.evaluation.records import BINS, EpisodeRecord
from raymaml.meta.learner import MetaLearner
from raymaml.training.data import EpisodeSet
from raymaml.types import Episode

EPISODES_AT_ONCE = 8
"""Episodes whose images are in memory together; records do not depend on it."""


def judge(learner: MetaLearner, episodes: EpisodeSet, indices: range) -> Iterator[EpisodeRecord]:
    """Adapt to each episode and yield its record, in order."""
    for index, rows, episode in read_episodes(episodes, indices):
        torch.manual_seed(episodes.seed_of(index))
        started = seconds_after_all(episode.query_x.device)
        logits = learner.logits_by_step(episode)  # [T+1, N*Q, N]
        seconds = seconds_after_all(episode.query_x.device) - started
        yield record_of(logits, episode.query_y, seconds, rows, index)


def seconds_after_all(device: torch.device) -> float:
    """Return the time in seconds, after a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_episodes(
    episodes: EpisodeSet, indices: range
) -> Iterator[tuple[int, EpisodeRows, Episode]]:
    """Yield the episodes of these indices with their rows, a few at a time in memory."""
    for start in range(indices.start, indices.stop, EPISODES_AT_ONCE):
        some = range(start, min(start + EPISODES_AT_ONCE, indices.stop))
        rows = episodes.shards.rows(some)
        yield from zip(some, rows, episodes.load(some), strict=True)


def record_of(
    logits: Tensor, labels: Tensor, seconds: float, rows: EpisodeRows, index: int
) -> EpisodeRecord:
    """Return the record of query logits ``[T+1, N*Q, N]``, one row per inner step."""
    losses = torch.stack([F.cross_entropy(scores, labels) for scores in logits]).double().tolist()
    # argmax takes what is not a number for the largest: no image is right by that
    right = (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)  # [T+1, N*Q]
    accuracies = (right.sum(1).double() / len(labels)).tolist()
    probabilities = logits[-1].double().softmax(1)
    confidence = probabilities.amax(1).nan_to_num()  # what is not a number, in the first bin
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    ways = len(rows.classes)
    right_of_label = torch.bincount(labels, right[-1].double(), ways)
    return EpisodeRecord(
        episode=index,
        accuracy=accuracies[-1],
        loss=losses[-1],
        accuracy_by_step=tuple(accuracies),
        loss_by_step=tuple(losses),
        class_accuracy=tuple((right_of_label / torch.bincount(labels, minlength=ways)).tolist()),
        class_ids=tuple(rows.classes.tolist()),
        support_rows=tuple(rows.support.tolist()),
        support_labels=tuple(rows.support_labels.tolist()),
        query_rows=tuple(rows.query.tolist()),
        query_labels=tuple(rows.query_labels.tolist()),
        bin_count=tuple(torch.bincount(bins, minlength=BINS).tolist()),
        bin_confidence=tuple(torch.bincount(bins, confidence, BINS).tolist()),
        bin_correct=tuple(torch.bincount(bins, right[-1].double(), BINS).long().tolist()),
        brier=float((probabilities - F.one_hot(labels, logits.shape[-1])).square().sum(1).mean()),
        seconds=seconds,
    )
