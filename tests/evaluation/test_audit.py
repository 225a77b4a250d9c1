"""Audits: they find what they look for, and nothing where there is nothing."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.config.norm import NormPolicy
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.evaluation.audit import (
    Subject,
    audit_labels,
    audit_queries,
    audit_support,
    audit_transduction,
)
from raymaml.training.data import open_episode_sets
from raymaml.training.features import Predict, nearest_class_mean, predictor
from raymaml.training.state import build_learner

CPU = torch.device("cpu")
INDUCTIVE = [norm for norm in get_args(NormPolicy) if norm != "transductive"]


def subject(config: Config, bank: ImageBank, predict: Predict | None = None) -> Subject:
    if predict is None:
        learner = build_learner(config, bank.image_shape, config.episodes.test.num_ways, CPU)
        predict = predictor(learner)
    episodes = open_episode_sets(config.data, config.episodes, bank, ("test",), CPU)["test"]
    return Subject(predict=predict, episodes=episodes, bank=bank)


@pytest.mark.parametrize("norm", INDUCTIVE)
def test_every_inductive_norm_passes(make_config, tiny_bank, norm: str) -> None:
    config = make_config("audit", f"model.norm={norm}")
    result = audit_transduction(subject(config, tiny_bank), inductive=True, count=4)
    assert result.outcome == "passed", result
    assert max(row["largest difference of logits"] for row in result.rows) <= 1e-5


def test_a_transductive_model_labelled_inductive_is_flagged(make_config, tiny_bank) -> None:
    audited = subject(make_config("audit"), tiny_bank)
    result = audit_transduction(audited, inductive=True, count=4)
    assert result.outcome == "flagged"
    assert "depend on which queries" in result.sentence
    assert audit_transduction(audited, inductive=False, count=4).outcome == "measured"


def test_a_model_that_peeks_at_one_class_is_flagged(make_config, tiny_bank) -> None:
    """One at a time it predicts as all at once; it looks at its neighbours' mean otherwise."""

    def peeks(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        logits = nearest_class_mean()(support_x, support_y, query_x)
        return logits + 0.01 * (len(query_x) == 2)  # of 3 classes and 2 queries: one class

    result = audit_transduction(
        subject(make_config("audit"), tiny_bank, peeks), inductive=True, count=2
    )
    apart = {row["queries"]: row["largest difference of logits"] for row in result.rows}
    assert apart["one at a time"] <= 1e-5
    assert apart["one class at a time"] > 1e-3
    assert result.outcome == "flagged"


def test_a_model_that_predicts_nothing_does_not_pass(make_config, tiny_bank) -> None:
    """Not a number differs from not a number: it is no evidence of induction."""

    def predicts_nothing(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return torch.full((len(query_x), 3), float("nan"))

    audited = subject(make_config("audit"), tiny_bank, predicts_nothing)
    assert audit_transduction(audited, inductive=True, count=1).outcome == "flagged"


def test_labels_matter_only_where_the_head_has_a_start_for_each(make_config, tiny_bank) -> None:
    symmetric = subject(make_config("a", "model.head=zero"), tiny_bank)
    learned = subject(make_config("b", "model.head=learned", "inner.lr=0.01"), tiny_bank)
    same, apart = (audit_labels(each, count=6, permutations=6) for each in (symmetric, learned))
    accuracy = {row["naming"]: row["accuracy"] for row in same.rows}
    assert len({text.split()[0] for text in accuracy.values()}) == 1
    accuracy = {row["naming"]: float(row["accuracy"].split("%")[0]) for row in apart.rows}
    assert accuracy["the best for each episode"] > accuracy["the worst for each episode"]


def test_the_search_finds_the_support_set_that_decides(make_config, tiny_bank) -> None:
    result = audit_support(subject(make_config("audit"), tiny_bank), count=4, tries=3)
    worst, drawn, best = (float(row["accuracy"].split("%")[0]) for row in result.rows)
    assert worst <= drawn <= best
    assert worst < best


def test_queries_are_taken_from_the_episodes_own(make_config, tiny_bank) -> None:
    seen: list[list[int]] = []

    def first_class(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        seen.append([len(query_x)])
        return F.one_hot(torch.zeros(len(query_x), dtype=torch.int64), 3).float()

    config = make_config("audit", "episodes.test.num_queries=4")
    result = audit_queries(subject(config, tiny_bank, first_class), count=2)
    accuracy = {row["query set"]: row["accuracy"].split()[0] for row in result.rows}
    assert accuracy == {
        "1 a class": "33.33%",
        "2 a class": "33.33%",
        "4 a class": "33.33%",
        "balanced, 4 in all": "50.00%",  # 2 + 1 + 1
        "each class 2 times as often as the next, 4 in all": "50.00%",  # 2.3, 1.1, 0.6: 2 + 1 + 1
        "each class 4 times as often as the next, 4 in all": "75.00%",  # 3.05, 0.76, 0.19
        "all 4 of one class": "100.00%",
    }
    assert [count for (count,) in seen[:7]] == [3, 6, 12, 4, 4, 4, 4]
