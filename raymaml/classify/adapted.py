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
from raymaml.types import Episode, Fast


@alone()
def adapted(learner: MetaLearner, support_x: Tensor, support_y: Tensor) -> Fast:
    """Adapt to a support set, as ``MetaLearner.predict`` does.

    Where classes have different numbers of images, which no episode of training has, cross-entropy
    weighs the classes equally. Else few steps at a high rate would teach the head how often a class
    comes, and a class with one image less would hardly be predicted.

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
    counts = support_y.bincount()
    if learner.loss_fn is F.cross_entropy and not bool((counts == counts[0]).all()):
        learner = copy.copy(learner)  # of the same model
        learner.loss_fn = balanced_cross_entropy(counts)
    *_, fast = learner.adapt(episode)
    params = {name: value.detach() for name, value in fast.params.items()}
    with torch.no_grad():
        ready = replace(fast, params=params, state={})
        return learner.passes_of_test().with_context(ready, episode.support_x)


@alone()
@torch.no_grad()
def query_logits(learner: MetaLearner, fast: Fast, images: Tensor) -> Tensor:
    """Return the logits ``[B, N]`` of images ``[B, C, H, W]`` at what ``adapted`` returned."""
    if learner.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return learner.passes_of_test().query(fast, images)
