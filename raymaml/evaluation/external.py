"""Any other model, judged on the same episodes with the same records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from raymaml.common.errors import UserError, reason_of
from raymaml.common.logs import LOG
from raymaml.config.schema import Config
from raymaml.evaluation.examination import (
    EPISODES,
    Examination,
    Precision,
    examine,
    one_query,
)
from raymaml.evaluation.judge import judge as judge_episodes
from raymaml.evaluation.records import RecordArrays, record_arrays, records_table
from raymaml.evaluation.run_test import plan_test
from raymaml.meta.calls import alone
from raymaml.meta.learner import MetaLearner
from raymaml.training.data import open_bank, open_episode_sets
from raymaml.training.settings import local_device, set_precision
from raymaml.types import Episode, EpisodeBatch

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(support images [N*K, C, H, W], support labels [N*K], query images [N*Q, C, H, W]) -> logits
[N*Q, N]."""


def judge(predict: Predict, config: Config, *, num_episodes: int | None = None) -> RecordArrays:
    """Judge any model on the test episodes of ``config``, as `raymaml test` judges its own.

    Inner steps are not visible: values by step have one entry, the result. To compare two models on
    the same episodes, give their records to ``paired``; to keep or report them, see
    ``raymaml.evaluation.record_files`` and ``raymaml.report.write``.

    Args:
        predict: the model, called with gradients switched off (``torch.enable_grad`` switches them
            on). First it is examined on a few episodes: with the images in another order, and one
            query at a time. The ``examination`` of the result shows whether it is inductive, and a
            warning names what is wrong; None where the examination fails. Then ``predict`` is
            called once per episode, in order.
        config: names bank, shards, normalisation and precision, which the process keeps; its model
            and its run do not matter.
        num_episodes: number of the first episodes to judge; None: all.

    Raises:
        UserError: bank or shards are missing or do not fit, there are fewer episodes, or what
            ``predict`` returns are no logits.
    """
    device = local_device(config.cluster)
    set_precision(config.cluster)
    episodes = open_episode_sets(
        config.data, config.episodes, open_bank(config.data), ("test",), device
    )["test"]
    available = config.episodes.test.num_episodes
    count = available if num_episodes is None else num_episodes
    if not 0 < count <= available:
        raise UserError(
            f"num_episodes is {count}",
            remedy=f"{config.data.shards} holds {available} test episodes",
        )
    some = episodes.load(range(min(EPISODES, count)))
    examination = _examined(predict, some, config.cluster.precision)
    numbers = itertools.count()

    def by_step(episode: Episode) -> Tensor:  # [1, N*Q, N]
        return _logits(predict, episode, f"episode {next(numbers)}")[None]

    table = records_table([*judge_episodes(by_step, episodes, range(count))])
    found = record_arrays(
        table.replace_schema_metadata({"bank": episodes.shards.manifest.bank_hash})
    )
    return replace(found, examination=examination)


def _examined(predict: Predict, episodes: EpisodeBatch, precision: Precision) -> Examination | None:
    try:
        found = examine_predictions(predict, episodes, precision)
    except Exception as error:  # of any model; its records do not depend on this
        LOG.warning("predict: could not be examined (%s)", reason_of(error))
        return None
    if found.caution:
        LOG.warning("predict: %s", found.caution)
    return found


def examine_predictions(
    predict: Predict, episodes: EpisodeBatch, precision: Precision = "float32"
) -> Examination:
    """Examine a model on ``episodes``; logits of a half type are never better than bf16."""

    def logits_of(episode: Episode) -> Tensor:
        return _logits(predict, episode, "an episode of its examination")

    def company(episode: Episode) -> Iterator[Tensor]:
        yield logits_of(episode).float()
        for place in range(len(episode.query_y)):
            yield logits_of(one_query(episode, place)).float()

    half = logits_of(episodes[0]).dtype in (torch.bfloat16, torch.float16)
    return examine(
        lambda episode: logits_of(episode).float()[None],
        company,
        episodes,
        "bf16" if half else precision,
    )


@torch.no_grad()
def _logits(predict: Predict, episode: Episode, which: str) -> Tensor:
    """Return what ``predict`` says of an episode, after a check that these are logits."""
    logits: object = predict(episode.support_x, episode.support_y, episode.query_x)
    shape = (len(episode.query_y), int(episode.support_y.max()) + 1)
    if not isinstance(logits, Tensor) or logits.shape != shape or not logits.is_floating_point():
        found = (
            f"{logits.dtype} of shape {list(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise UserError(
            f"predict: returned {found} for {which}",
            remedy=f"it must return floating-point logits of shape {list(shape)}, a row a query"
            " image, a column a label",
        )
    return logits.detach().to(episode.query_y.device)


def load_learner(config: Config) -> MetaLearner:
    """Return the meta-learner of a run, at the checkpoint that `raymaml test` judges.

    Raises:
        UserError: as `raymaml test`.
    """
    campaign = plan_test(config, local_device(config.cluster))
    return campaign.arm("model").build()


def predictor(learner: MetaLearner) -> Predict:
    """Return a meta-learner as a callable: it adapts to the support set and predicts."""

    def predict(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        labels = torch.zeros(len(query_x), dtype=torch.int64, device=support_y.device)  # not read
        one = EpisodeBatch(
            support_x=support_x[None],
            support_y=support_y[None],
            query_x=query_x[None],
            query_y=labels[None],
        )
        return learner.predict(one)[0]

    return predict


def features(learner: MetaLearner) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a callable for the encoder's features of support and query images: ``[B, F]`` each.

    It adapts nothing. The features are float32, computed in the learner's precision. Images pass as
    query images do, by the moments of the norm policy.
    """
    inner = learner.test_inner.model_copy(update={"num_steps": 0})
    still = MetaLearner(
        learner.model,
        learner.inner,
        head=learner.head,
        test_inner=inner,
        channels_last=learner.channels_last,
        half_precision=learner.half_precision,
    )
    predict = predictor(still)
    captured: list[Tensor] = []

    def passed(images: Tensor, support_x: Tensor, support_y: Tensor) -> Tensor:
        head = learner.model.get_submodule("head")
        hook = head.register_forward_pre_hook(lambda _head, inputs: captured.append(inputs[0]))
        try:
            predict(support_x, support_y, images)
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
