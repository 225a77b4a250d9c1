"""Adapted once, asked often: one support set, and query images in batches of any size."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.meta.learner import MetaLearner
from raymaml.passes.calls import alone
from raymaml.passes.losses import balanced_cross_entropy
from raymaml.types import Episode, EpisodeBatch, Fast


@alone()
def adapted(learner: MetaLearner, support_x: Tensor, support_y: Tensor) -> Fast:
    """Adapt to a support set, as ``MetaLearner.predict`` does.

    Args:
        learner: adapts by its ``test_inner``.
        support_x: ``[S, C, H, W]``.
        support_y: ``[S]``, 0..N-1; classes may have different numbers of images.

    Returns:
        The adapted weights, and buffers with the moments that normalise its queries.
    """
    episode = Episode(
        support_x=support_x, support_y=support_y, query_x=support_x, query_y=support_y
    )
    episode = episode.channels_last() if learner.channels_last else episode
    *_, fast = balanced(learner, support_y).adapt(episode)
    params = {name: value.detach() for name, value in fast.params.items()}
    with torch.no_grad():
        ready = replace(fast, params=params, state={})
        return learner.passes_of_test().with_context(ready, episode.support_x)


def balanced(learner: MetaLearner, labels: Tensor) -> MetaLearner:
    """Return the learner, or where classes have different numbers of images, which no episode of
    training has, one of the same model whose cross-entropy weighs the classes equally.

    Else few steps at a high rate would teach the head how often a class comes, and a class with one
    image less would hardly be predicted.

    Args:
        learner: of a model.
        labels: of support sets, ``[..., S]``, 0..N-1.
    """
    ways = torch.arange(int(labels.max()) + 1, device=labels.device)
    counts = (labels[..., None] == ways).sum(-2)  # [..., N]
    if learner.loss_fn is F.cross_entropy and not bool((counts == counts[..., :1]).all()):
        learner = copy.copy(learner)
        learner.loss_fn = balanced_cross_entropy
    return learner


@alone()
def fold_logits(
    learner: MetaLearner, images: Tensor, labels: Tensor, left_out: Tensor, *, among: bool
) -> Tensor:
    """Return the logits ``[E, N]`` of E images, each at weights adapted to all others.

    Args:
        learner: adapts by its ``test_inner``; to several sets at once, equal to rounding.
        images: ``[S, C, H, W]``.
        labels: ``[S]``, 0..N-1.
        left_out: ``[E]``, rows of the images.
        among: whether an image is judged together with the others, or alone.
    """
    rows = torch.arange(len(labels), device=labels.device)
    others = rows[:-1] + (rows[:-1] >= left_out[:, None])  # [E, S-1]
    asked = rows.expand(len(left_out), -1) if among else left_out[:, None]
    folds = EpisodeBatch(
        support_x=images[others],
        support_y=labels[others],
        query_x=images[asked],
        query_y=labels[asked],
    )
    learner = balanced(learner, folds.support_y)
    logits = learner.predict(folds, at_once=len(folds))  # [E, Q, N]
    return logits[torch.arange(len(folds)), left_out] if among else logits[:, 0]


@alone()
@torch.no_grad()
def query_logits(learner: MetaLearner, fast: Fast, images: Tensor) -> Tensor:
    """Return the logits ``[B, N]`` of images ``[B, C, H, W]`` at what ``adapted`` returned."""
    if learner.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return learner.passes_of_test().query(fast, images)
