"""What is judged: cosine similarity by hand, and the ensemble as the mean of its members."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers_evaluation import judge_run
from helpers_faults import quiet
from torch import Tensor, nn

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.config.schema import Config
from raymaml.evaluation.campaign import replay
from raymaml.evaluation.examination import examine
from raymaml.evaluation.model import JudgedModel, adapting, by_cosine, ensemble
from raymaml.evaluation.records import record_arrays
from raymaml.evaluation.run_audit import audit_run, read_audits
from raymaml.evaluation.run_test import plan_test
from raymaml.meta.learner import MetaLearner
from raymaml.reports.write import headline_of, write_test_report
from raymaml.training.checkpoint import find_checkpoint, find_checkpoints, load_weights, read_card
from raymaml.training.data import open_episode_sets
from raymaml.training.state import build_learner
from raymaml.training.worker import train_locally
from raymaml.types import Episode

CPU = torch.device("cpu")


class Linear(nn.Module):
    """Two pixels -> two features, the second one doubled; then a head, which is no good."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.diag(torch.tensor([1.0, 2.0])))
            self.head.weight.fill_(torch.nan)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x.flatten(1)))
        return logits


def images(*pixels: tuple[float, float]) -> Tensor:
    return torch.tensor(pixels).float()[:, None, None]  # [B, 1, 1, 2]


BY_HAND = Episode(
    # features (1, 0), (-2, 0), (0, 2), (0, -6), (3, 4)
    support_x=images((1, 0), (-2, 0), (0, 1), (0, -3), (3, 2)),
    support_y=torch.tensor([0, 1, 0, 1, 0]),
    # features (3, 4), (0, 0), (0, -2)
    query_x=images((3, 2), (0, 0), (0, -1)),
    query_y=torch.tensor([0, 0, 1]),
)
# (3, 4) / 5: cosines 0.6, 0.8, 1 to class 0, and -0.6, -0.8 to class 1; (0, -1): 0, -1, -0.8 to
# class 0, and 0, 1 to class 1
COSINES = [[0.8, -0.7], [0.0, 0.0], [-0.6, 0.5]]


@pytest.mark.parametrize("head", ["learned", "zero", "prototypes"])
@pytest.mark.parametrize(
    "inner",
    [
        {},
        {"rule": "adam", "rates": "per_tensor_per_step"},
        {"support_batch_size": 2, "gradient": "implicit", "proximal": 1.0},
        {"multi_step_loss": {"num_outer_steps": 2, "num_stages": 1}},
    ],
    ids=str,
)
def test_cosine_similarity_by_hand(head: Any, inner: dict[str, Any]) -> None:
    """Neither the inner loop nor the head matters."""
    learner = MetaLearner(Linear(), InnerConfig(num_steps=3, lr=0.5, **inner), head_start=head)
    model = by_cosine(learner)
    expected = torch.tensor(COSINES)
    torch.testing.assert_close(model.by_step(BY_HAND), expected[None])
    torch.testing.assert_close(
        model.predict(BY_HAND.support_x, BY_HAND.support_y, BY_HAND.query_x), expected
    )
    together, *alone = model.company(BY_HAND)
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(torch.cat(alone), expected)
    found = examine(model.by_step, model.company, [BY_HAND])
    assert (found.caution, found.is_inductive) == ("", True)


def test_pixels_have_cosines_too() -> None:
    found = raymaml.cosine_similarity()(images((1, 0), (0, 2)), torch.arange(2), images((3, 4)))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    def member(number: float) -> JudgedModel:
        logits = torch.tensor([[number, 1.0], [0.0, number]])
        return JudgedModel(
            predict=lambda *_task: logits,
            by_step=lambda _episode: torch.stack([0 * logits, logits]),
            company=lambda _episode: iter([logits, logits[:1], logits[1:]]),
        )

    both = ensemble([member(1), member(4)])  # the mean of 1 and 4 is 2.5
    mean = torch.tensor([[2.5, 1.0], [0.0, 2.5]])
    assert torch.equal(both.predict(*(torch.empty(0),) * 3), mean)
    assert torch.equal(both.by_step(BY_HAND), torch.stack([0 * mean, mean]))
    assert [each.tolist() for each in both.company(BY_HAND)] == [
        mean.tolist(),
        [[2.5, 1.0]],
        [[0.0, 2.5]],
    ]


@pytest.fixture
def make_run(make_config: Any) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        steps = ("outer.num_steps=4", "outer.validate_every=1", "outer.lr=0.02")
        config: Config = make_config("run", "model.norm=context", *steps, *overrides)
        assert train_locally(config, quiet)
        return config

    return make


THREE = ("outer.keep_best=3", "evaluation.checkpoint=ensemble")


def test_the_ensemble_of_a_run_judges_by_the_mean_of_separate_logits(make_run: Any) -> None:
    config = make_run(*THREE)
    campaign = judge_run(config)
    arm, untrained, still = campaign.arms
    kept = find_checkpoints(config.run_folder, "ensemble")
    assert arm.checkpoints == kept
    assert len(kept) == 3
    cards = [read_card(path) for path in kept]
    assert arm.identity["weights"].split() == [card.files[card.weights] for card in cards]
    assert (untrained.checkpoints, still.checkpoints) == ((), kept)

    episode = arm.episodes.load(range(1))[0]
    separate = []
    for path in kept:
        learner = build_learner(config, arm.bank.image_shape, 3, CPU)
        load_weights(learner, path, CPU)
        separate.append(learner.logits_by_step(episode))
    assert not torch.equal(separate[0], separate[1])
    mean = (separate[0] + separate[1] + separate[2]) / 3
    torch.testing.assert_close(arm.build().by_step(episode), mean)
    result = campaign.results()[0]
    assert (
        record_arrays(result.records).query_predictions[0].tolist() == mean[-1].argmax(1).tolist()
    )
    assert replay(campaign, quiet) == 10 + 5 + 5

    text = "mean of the logits of the best checkpoints, 3 kept, adapted"
    assert result.description == text
    path = write_test_report(campaign)
    assert " | ensemble of 3 checkpoints" in headline_of(path)
    found = json.loads(path.read_text())["identity"]["checkpoint"]
    assert found == ", ".join(sorted(each.name for each in kept))
    assert text in (path.parent / "report.md").read_text()


def test_an_ensemble_is_audited_and_examined_as_one_model(make_run: Any) -> None:
    config = make_run(*THREE)
    campaign = judge_run(config)
    audit_run(config, quiet)
    audits = {each.name: each for each in read_audits(campaign)}
    assert audits["transduction"].outcome == "passed"
    result = campaign.results()[0]
    assert result.protocol.examination is not None
    assert result.protocol.examination.is_inductive is True


def test_a_run_that_kept_one_is_judged_as_that_one(make_run: Any) -> None:
    config = make_run()
    judge_run(config)
    changes = {
        "evaluation": config.evaluation.model_copy(update={"checkpoint": "ensemble"}),
        "outer": config.outer.model_copy(update={"keep_best": 3}),
    }
    campaign = plan_test(config.model_copy(update=changes), CPU)
    assert campaign.missing() == []  # its records are those of the best checkpoint
    model = campaign.results()[0]
    assert model.description == "mean of the logits of the best checkpoints, 1 kept, adapted"
    assert " | single model" in str(model.protocol)


def test_a_young_run_has_the_members_that_there_are(make_run: Any) -> None:
    """Validated before step 0 and after step 3."""
    config = make_run("outer.validate_every=9", *THREE)
    arm = plan_test(config, CPU).arms[0]
    assert sorted(path.name[-1] for path in arm.checkpoints) == ["0", "4"]
    assert "2 kept" in arm.description


def accuracy_by_cosine(config: Config, split: Any, which: Any, count: int) -> float:
    """Judge by hand: the encoder's features, normalised, and means over classes."""
    learner = build_learner(config, (1, 16, 16), 3, CPU)
    load_weights(learner, find_checkpoint(config.run_folder, which), CPU)
    embed, right = raymaml.features(learner), []
    bank = plan_test(config, CPU).arms[0].bank
    episodes = open_episode_sets(config.data, config.episodes, bank, (split,), CPU)[split]
    for episode in episodes.load(range(count)):
        support, query = embed(episode.support_x, episode.support_y, episode.query_x)
        cosines = nn.functional.cosine_similarity(query[:, None], support[None], dim=2)
        logits = cosines[:, episode.support_y.argsort()]  # one shot
        right += (logits.argmax(1) == episode.query_y).tolist()
    return float(np.mean(right))


def test_a_run_is_validated_and_tested_by_cosine_similarity(make_run: Any) -> None:
    config = make_run("evaluation.head=cosine", "evaluation.inner.num_steps=7")
    last = read_card(find_checkpoint(config.run_folder, "last")).validation
    assert last is not None
    assert last.accuracy == pytest.approx(accuracy_by_cosine(config, "val", "last", 4))
    campaign = judge_run(config)
    model, untrained = campaign.results()
    accuracy = record_arrays(model.records).accuracy
    assert accuracy.mean() == pytest.approx(accuracy_by_cosine(config, "test", "best", 10))
    assert record_arrays(model.records).accuracy_by_step.shape == (10, 1)
    assert model.description == "best checkpoint, by cosine similarity"
    assert untrained.description == "initial weights, by cosine similarity alike"
    path = write_test_report(campaign)
    assert " | 0 steps | head cosine | single model" in headline_of(path)
    assert replay(campaign, quiet) == 10 + 5

    audit_run(config, quiet)
    audits = {each.name: each for each in read_audits(campaign)}
    assert audits["transduction"].outcome == "passed"


def test_another_head_is_another_arm_and_another_validation(make_run: Any) -> None:
    config = make_run()
    own = plan_test(config, CPU).arms[0]
    assert "head" not in own.identity  # records of before stay good
    evaluation = config.evaluation.model_copy(update={"head": "cosine"})
    cosine = config.model_copy(update={"evaluation": evaluation})
    other = plan_test(cosine, CPU).arms[0]
    assert other.identity["head"] == "cosine"
    assert other.records != own.records
    outer = config.outer.model_copy(update={"num_steps": 6})
    with pytest.raises(UserError, match=r"was validated with evaluation\.head = 'model', the"):
        train_locally(cosine.model_copy(update={"outer": outer}), quiet)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "evaluation.head=cosine",
            "evaluation.head is cosine, and a learner answers by the head of its model; give the"
            " CONFIG with evaluation.head=model; `raymaml test` judges by cosine",
        ),
        (
            "evaluation.checkpoint=ensemble",
            "evaluation.checkpoint is ensemble, and a learner is one model; set"
            " evaluation.checkpoint=best; `raymaml test` judges the ensemble",
        ),
    ],
)
def test_one_learner_is_neither(make_run: Any, override: str, says: str) -> None:
    config = make_run("outer.keep_best=2", override)
    for opened in (
        raymaml.load_learner,
        raymaml.FewShotClassifier.load,
    ):
        with pytest.raises(UserError) as caught:
            opened(config)
        assert str(caught.value) == says


def test_an_ensemble_of_one_best_checkpoint_is_refused(make_config: Any) -> None:
    with pytest.raises(UserError, match=r"outer\.keep_best is 1: the run keeps one best checkp"):
        make_config("one", "evaluation.checkpoint=ensemble")


def test_adapting_is_the_learner() -> None:
    learner = MetaLearner(Linear(), InnerConfig(num_steps=2, lr=0.5), head_start="zero")
    model = adapting(learner)
    assert torch.equal(model.by_step(BY_HAND), learner.logits_by_step(BY_HAND))
    assert torch.equal(next(model.company(BY_HAND)), model.by_step(BY_HAND)[-1])
