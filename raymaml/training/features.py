"""A meta-learner as a function of images: its predictions, its features, classifiers by them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.meta.learner import MetaLearner
from raymaml.passes.calls import alone
from raymaml.passes.fitting import Head
from raymaml.passes.forward import entering
from raymaml.types import Episode, EpisodeBatch

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(support images [N*K, C, H, W], support labels [N*K], query images [N*Q, C, H, W]) -> logits
[N*Q, N]."""
Embed = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As ``Predict``, -> the features of support and query images, ``[N*K, F]`` and ``[N*Q, F]``."""


def predictor(learner: MetaLearner) -> Predict:
    """Return a meta-learner as a callable: it adapts to the support set and predicts."""
    return learner


def at_once(learner: MetaLearner) -> Callable[[EpisodeBatch], Tensor]:
    """Return a callable for the logits ``[E, N*Q, N]`` of episodes, which are vectorised."""
    return lambda episodes: learner.predict(episodes, at_once=len(episodes))


def features(learner: MetaLearner) -> Embed:
    """Return a callable for the encoder's features of support and query images: ``[B, F]`` each.

    It adapts nothing. The features are float32, computed in the learner's precision. Images pass as
    query images do, by the moments of the norm policy.
    """
    still = copy.copy(learner)  # of the same model
    still.head = Head(learner.head.name, "zero")  # whose rows fit any labels; it is not asked
    still.test_inner = learner.test_inner.model_copy(update={"num_steps": 0})

    def passed(images: Tensor, support_x: Tensor, support_y: Tensor) -> Tensor:
        with entering(learner.model, learner.head.name) as captured:
            still(support_x, support_y, images)
        return captured[-1].detach().float()

    @alone()
    def embed(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            passed(support_x, support_x, support_y),
            passed(query_x, support_x, support_y),
        )

    return embed


def over_episodes(predict: Predict) -> Callable[[EpisodeBatch], Tensor]:
    """Return a callable for the logits ``[E, N*Q, N]`` of episodes, one after the other."""
    return lambda episodes: torch.stack(
        [predict(each.support_x, each.support_y, each.query_x) for each in episodes]
    )


def nearest_class_mean(embed: Embed | None = None) -> Predict:
    """Return the classifier by the nearest class mean (Snell et al. 2017, equation 2).

    The logits are negative squared distances, divided by the number of features.

    Args:
        embed: support images, support labels and query images -> features of both, as
            ``features`` returns it; None: the pixels.
    """

    def logits(support: Tensor, query: Tensor, of_way: list[Tensor]) -> Tensor:
        means = torch.stack([support[rows].mean(0) for rows in of_way])
        return -torch.cdist(query, means).square() / means.shape[1]

    return _by_features(embed, logits)


def cosine_similarity(embed: Embed | None = None) -> Predict:
    """Return the classifier by cosine similarity: NIL (Raghu et al. 2020, section 5).

    Similarities weigh the labels of the support images, as in matching networks (Vinyals et al.
    2016): the logit of a class is the mean over its support images of the cosine between the
    features of the query and theirs, -1..1. A vector of zeros has the cosine 0 to any other.

    Args:
        embed: as of ``nearest_class_mean``.
    """

    def logits(support: Tensor, query: Tensor, of_way: list[Tensor]) -> Tensor:
        cosines = F.normalize(query) @ F.normalize(support).T  # [N*Q, N*K]
        return torch.stack([cosines[:, rows].mean(1) for rows in of_way], 1)

    return _by_features(embed, logits)


def _by_features(
    embed: Embed | None, logits: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
) -> Predict:
    """Return a classifier by features of support ``[N*K, F]``, of query, and rows of each way."""

    def predict(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        labels = support_y.new_zeros(len(query_x))  # not read
        task = Episode(support_x=support_x, support_y=support_y, query_x=query_x, query_y=labels)
        support_y = task.support_y
        support, query = (
            (support_x, query_x) if embed is None else embed(support_x, support_y, query_x)
        )
        ways = range(int(support_y.max()) + 1)
        of_way = [torch.where(support_y == way)[0] for way in ways]
        return logits(support.flatten(1), query.flatten(1), of_way)

    return predict


HEADS: dict[str, Callable[[MetaLearner], Predict]] = {
    "model": predictor,
    "cosine": lambda learner: cosine_similarity(features(learner)),
}
"""The classifiers of ``evaluation.head`` by name."""
