"""Judging a learner on episodes: one record each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.evaluation.records import EpisodeRecord
from raymaml.meta.learner import MetaLearner
from raymaml.training.data import EpisodeSet
from raymaml.types import Episode

EPISODES_AT_ONCE = 8
"""Episodes whose images are in memory together; records do not depend on it."""


def judge(learner: MetaLearner, episodes: EpisodeSet, indices: range) -> Iterator[EpisodeRecord]:
    """Adapt to each episode and yield its record, in order."""
    for start in range(indices.start, indices.stop, EPISODES_AT_ONCE):
        some = range(start, min(start + EPISODES_AT_ONCE, indices.stop))
        rows = episodes.shards.rows(some)
        for index, row, episode in zip(some, rows, episodes.load(some), strict=True):
            losses, accuracies = judge_episode(learner, episode)
            yield EpisodeRecord(
                episode=index,
                accuracy=accuracies[-1],
                loss=losses[-1],
                accuracy_by_step=tuple(accuracies),
                class_ids=tuple(row.classes.tolist()),
            )


def judge_episode(learner: MetaLearner, episode: Episode) -> tuple[list[float], list[float]]:
    """Return the query losses and query accuracies after 0..T inner steps."""
    logits = learner.logits_by_step(episode)  # [T+1, N*Q, N]
    losses = [F.cross_entropy(scores, episode.query_y) for scores in logits]
    correct = (logits.argmax(-1) == episode.query_y).sum(1)  # [T+1]
    accuracies: Tensor = correct.double() / len(episode.query_y)
    return torch.stack(losses).double().tolist(), accuracies.tolist()
