"""A meta-learner as a function of images: its predictions, its features, and the class means."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from raymaml.meta.learner import MetaLearner
from raymaml.passes.calls import alone
from raymaml.passes.fitting import Head
from raymaml.types import Episode, EpisodeBatch

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(support images [N*K, C, H, W], support labels [N*K], query images [N*Q, C, H, W]) -> logits
[N*Q, N]."""


def predictor(learner: MetaLearner) -> Predict:
    """Return a meta-learner as a callable: it adapts to the support set and predicts."""
    return learner


def features(learner: MetaLearner) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a callable for the encoder's features of support and query images: ``[B, F]`` each.

    It adapts nothing. The features are float32, computed in the learner's precision. Images pass as
    query images do, by the moments of the norm policy.
    """
    still = copy.copy(learner)  # of the same model
    still.head = Head(learner.head.name, "zero")  # whose rows fit any labels; it is not asked
    still.test_inner = learner.test_inner.model_copy(update={"num_steps": 0})
    captured: list[Tensor] = []

    def passed(images: Tensor, support_x: Tensor, support_y: Tensor) -> Tensor:
        head = learner.model.get_submodule(learner.head.name)
        hook = head.register_forward_pre_hook(lambda _head, inputs: captured.append(inputs[0]))
        try:
            still(support_x, support_y, images)
        finally:
            hook.remove()
        last = captured[-1]
        captured.clear()
        return last.detach().float()

    @alone()
    def embed(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            passed(support_x, support_x, support_y),
            passed(query_x, support_x, support_y),
        )

    return embed


def by_class_means(learner: MetaLearner) -> Callable[[EpisodeBatch], Tensor]:
    """Return a callable for logits ``[E, N*Q, N]`` by ``nearest_class_mean`` of features."""
    predict = nearest_class_mean(features(learner))
    return lambda episodes: torch.stack(
        [predict(each.support_x, each.support_y, each.query_x) for each in episodes]
    )


def nearest_class_mean(
    embed: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Predict:
    """Return the classifier by the nearest class mean (Snell et al. 2017, equation 2).

    The logits are negative squared distances, divided by the number of features.

    Args:
        embed: support images, support labels and query images -> features of both, as
            ``features`` returns it; None: the pixels.
    """

    def predict(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        labels = support_y.new_zeros(len(query_x))  # not read
        task = Episode(support_x=support_x, support_y=support_y, query_x=query_x, query_y=labels)
        support_y = task.support_y
        support, query = (
            (support_x, query_x) if embed is None else embed(support_x, support_y, query_x)
        )
        support, query = support.flatten(1), query.flatten(1)
        ways = range(int(support_y.max()) + 1)
        means = torch.stack([support[support_y == way].mean(0) for way in ways])
        return -torch.cdist(query, means).square() / means.shape[1]

    return predict
