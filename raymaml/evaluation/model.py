"""The model that an arm judges: one learner by the head of the evaluation, or several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.examination import ByStep, Company, one_by_one, one_query
from raymaml.meta.learner import MetaLearner
from raymaml.training.features import HEADS, Predict
from raymaml.training.graphs import replayed
from raymaml.types import Episode, EpisodeBatch


@dataclass(frozen=True, kw_only=True)
class JudgedModel:
    """A model as its judges see it."""

    predict: Predict
    by_step: ByStep
    company: Company


def adapting(learner: MetaLearner) -> JudgedModel:
    """Return a meta-learner, which adapts once for all queries of an episode."""

    def company(episode: Episode) -> Iterator[Tensor]:
        episode = episode.channels_last() if learner.channels_last else episode
        *_, fast = learner.adapt(episode)
        yield learner.query_logits(fast, episode)
        for place in range(len(episode.query_y)):
            yield learner.query_logits(fast, one_query(episode, place))

    return JudgedModel(
        predict=HEADS["model"](learner), by_step=learner.logits_by_step, company=company
    )


def by_graphs(model: JudgedModel, learner: MetaLearner, cluster: ClusterConfig) -> JudgedModel:
    """Return what ``adapting`` returned for a learner, on a GPU by CUDA graphs."""
    replays = replayed(model.by_step, learner, learner.test_inner, cluster, name="evaluation")

    def by_step(episode: Episode | EpisodeBatch) -> Tensor:
        return (replays if isinstance(episode, EpisodeBatch) else model.by_step)(episode)

    return replace(model, by_step=by_step)


def by_cosine(learner: MetaLearner) -> JudgedModel:
    """Return the features of a meta-learner under ``cosine_similarity``: no step is taken."""
    predict = HEADS["cosine"](learner)

    def logits(episode: Episode) -> Tensor:
        return predict(episode.support_x, episode.support_y, episode.query_x)

    def company(episode: Episode) -> Iterator[Tensor]:
        yield logits(episode)
        for place in range(len(episode.query_y)):
            yield logits(one_query(episode, place))

    return JudgedModel(
        predict=predict,
        by_step=one_by_one(lambda episode: logits(episode)[None]),
        company=company,
    )


MODELS: dict[str, Callable[[MetaLearner], JudgedModel]] = {"model": adapting, "cosine": by_cosine}
"""The models of ``evaluation.head`` by name."""


def ensemble(members: Sequence[JudgedModel]) -> JudgedModel:
    """Return the mean of the members' logits (MAML++, Antoniou et al. 2019, section 5).

    Each member adapts to the episode by itself; the mean of one is that one.
    """

    def company(episode: Episode) -> Iterator[Tensor]:
        for logits in zip(*(each.company(episode) for each in members), strict=True):
            yield _mean(logits)

    return JudgedModel(
        predict=lambda *task: _mean([each.predict(*task) for each in members]),
        by_step=lambda episode: _mean([each.by_step(episode) for each in members]),
        company=company,
    )


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(logits)).mean(0)
