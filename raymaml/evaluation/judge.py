"""Judging a model on episodes: one record each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.data.sampling import EpisodeRows
from raymaml.evaluation.examination import ByStep
from raymaml.evaluation.records import BINS, Record
from raymaml.training.at_once import AtOnce, computed
from raymaml.training.data import EpisodeSet
from raymaml.types import EpisodeBatch


def judge(
    by_step: ByStep, episodes: EpisodeSet, indices: range, at_once: AtOnce
) -> Iterator[Record]:
    """Have a model adapt to each episode, and yield its record, in order.

    Args:
        by_step: the model.
        episodes: of the test split.
        indices: episodes to judge.
        at_once: the number of episodes at once; each has the same share of their time.
    """

    def judged(some: EpisodeBatch) -> list[tuple[Tensor, Tensor, float]]:
        device = some.query_x.device
        started = seconds_after_all(device)
        logits = by_step(some)
        seconds = (seconds_after_all(device) - started) / len(some)
        pairs = zip(logits.cpu(), some.query_y.cpu(), strict=True)
        return [(each, labels, seconds) for each, labels in pairs]

    found = computed(episodes, indices, at_once, judged)
    for index, rows, result in zip(indices, episodes.shards.rows(indices), found, strict=True):
        yield record_of(*result, rows, index)


def seconds_after_all(device: torch.device) -> float:
    """Return the time in seconds, after a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def record_of(
    logits: Tensor, labels: Tensor, seconds: float, rows: EpisodeRows, index: int
) -> Record:
    """Return the record of query logits ``[T+1, N*Q, N]``, one row per inner step."""
    losses = torch.stack([F.cross_entropy(scores, labels) for scores in logits]).double().tolist()
    # argmax takes what is not a number for the largest: no image is right by that
    predicted = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)  # [T+1, N*Q]
    right = predicted == labels
    accuracies = (right.sum(1).double() / len(labels)).tolist()
    probabilities = logits[-1].double().softmax(1)
    confidence = probabilities.amax(1).nan_to_num()  # what is not a number, in the first bin
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    ways = len(rows.classes)
    right_of_label = torch.bincount(labels, right[-1].double(), ways)
    return {
        "episode": index,
        "accuracy": accuracies[-1],
        "loss": losses[-1],
        "accuracy_by_step": accuracies,
        "loss_by_step": losses,
        "class_accuracy": (right_of_label / torch.bincount(labels, minlength=ways)).tolist(),
        "class_ids": rows.classes.tolist(),
        "support_rows": rows.support.tolist(),
        "support_labels": rows.support_labels.tolist(),
        "query_rows": rows.query.tolist(),
        "query_labels": rows.query_labels.tolist(),
        "query_predictions": predicted[-1].tolist(),
        "bin_count": torch.bincount(bins, minlength=BINS).tolist(),
        "bin_confidence": torch.bincount(bins, confidence, BINS).tolist(),
        "bin_correct": torch.bincount(bins, right[-1].double(), BINS).long().tolist(),
        "brier": float(
            (probabilities - F.one_hot(labels, logits.shape[-1])).square().sum(1).mean()
        ),
        "seconds": seconds,
    }
