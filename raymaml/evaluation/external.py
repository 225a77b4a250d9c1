"""Any other model, judged on the same episodes with the same records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from raymaml.common.errors import UserError, reason_of
from raymaml.common.logs import LOG
from raymaml.config.schema import ClusterConfig, Config
from raymaml.data.bank_format import HEADER_FILE
from raymaml.evaluation.examination import (
    EPISODES,
    ByStep,
    Examination,
    Precision,
    examine,
    one_by_one,
    one_query,
)
from raymaml.evaluation.judge import judge as judge_episodes
from raymaml.evaluation.records import RecordArrays, record_arrays, records_table
from raymaml.evaluation.results import other_bank
from raymaml.meta.learner import MetaLearner
from raymaml.storage.files import exists
from raymaml.storage.place import Place
from raymaml.training.at_once import AtOnce, judging_at_once
from raymaml.training.data import open_bank, open_episode_sets
from raymaml.training.features import Predict
from raymaml.training.graphs import replayed
from raymaml.training.settings import local_device, set_determinism, set_precision
from raymaml.training.trained import open_trained
from raymaml.types import Episode, EpisodeBatch


def judge(predict: Predict, config: Config, *, num_episodes: int | None = None) -> RecordArrays:
    """Judge any model on the test episodes of ``config``, as `raymaml test` judges its own.

    Inner steps are not visible: values by step have one entry, the result. To compare two models on
    the same episodes, give their records to ``paired``; to keep or report them, see
    ``raymaml.evaluation.record_files`` and ``raymaml.reports.write``.

    Args:
        predict: the model, called with gradients switched off (``torch.enable_grad`` switches them
            on). First it is examined on a few episodes: with the images in another order, and one
            query at a time. The ``examination`` of the result shows whether it is inductive, and a
            warning names what is wrong; None where the examination fails. Then ``predict`` is
            called once per episode, in order; a ``MetaLearner`` takes as many at once as
            ``cluster.episodes_per_chunk`` says.
        config: names bank, shards, normalisation and precision, which the process keeps; its model
            and its run do not matter.
        num_episodes: number of the first episodes to judge; None: all.

    Raises:
        UserError: bank or shards are missing or do not fit, there are fewer episodes, or what
            ``predict`` returns are no logits.
    """
    device = local_device(config.cluster)
    set_precision(config.cluster)
    if device.type != "cpu":
        set_determinism(config.cluster)
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
    by_step, at_once = _one_by_one(predict), AtOnce(1, device)
    if type(predict) is MetaLearner:
        of = partial(replayed, cluster=config.cluster, name="predict")
        by_step = of(partial(_at_once, predict), predict, predict.test_inner)
        at_once = judging_at_once(config.cluster, predict.test_inner, device)
    table = records_table([*judge_episodes(by_step, episodes, range(count), at_once)])
    found = record_arrays(
        table.replace_schema_metadata({"bank": episodes.shards.manifest.bank_hash})
    )
    return replace(found, examination=examination)


def _one_by_one(predict: Predict) -> ByStep:
    numbers = itertools.count()
    return one_by_one(lambda each: _logits(predict, each, f"episode {next(numbers)}")[None])


def _at_once(learner: MetaLearner, episodes: Episode | EpisodeBatch) -> Tensor:
    assert isinstance(episodes, EpisodeBatch)
    return learner.predict(episodes, at_once=len(episodes))[:, None]  # [E, 1, N*Q, N]


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
        one_by_one(lambda episode: logits_of(episode).float()[None]),
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


def load_learner(where: Config | Place | str) -> MetaLearner:
    """Return the meta-learner of a run, at the checkpoint that `raymaml test` judges.

    Neither bank nor episodes are needed. A bank that is there has to be the one of training, unless
    ``evaluation.other_bank`` asks for another.

    Args:
        where: its config, or its folder.

    Raises:
        UserError: as ``open_trained``, or the bank is another.
    """
    cluster = where.cluster if isinstance(where, Config) else ClusterConfig()
    found = open_trained(where, local_device(cluster))
    if isinstance(where, Config) and exists(where.data.bank / HEADER_FILE):
        asked = where.evaluation.other_bank
        other_bank(where.run_folder / found.checkpoint, open_bank(where.data), asked=asked)
    return found.learner
