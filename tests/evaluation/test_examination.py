"""The examination: what looks at places or at company is found out, what does not passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import get_args

import pytest
import torch
from helpers_evaluation import judge_run
from helpers_faults import quiet
from torch import Tensor, nn
from torch.nn import functional as F

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.norm import NormPolicy
from raymaml.config.schema import Config
from raymaml.evaluation.campaign import replay
from raymaml.evaluation.examination import (
    EXAMINATION_FILE,
    Examination,
    examine,
    read_examination,
    write_examination,
)
from raymaml.evaluation.external import examine_predictions
from raymaml.evaluation.model import adapting
from raymaml.evaluation.results import Protocol
from raymaml.evaluation.run_test import plan_test
from raymaml.meta.learner import MetaLearner
from raymaml.reports.write import write_test_report
from raymaml.training.data import open_episode_sets
from raymaml.training.features import Predict, nearest_class_mean
from raymaml.training.state import build_learner
from raymaml.training.worker import train_locally
from raymaml.types import EpisodeBatch

CPU = torch.device("cpu")
NUMBERS = dict.fromkeys(("rounding", "chance", "support_order", "query_order", "company"), 0)


class Flat(nn.Module):
    """Images as they are: nothing depends on anything else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :32]


class ByPlace(nn.Module):
    """The place of an image in its batch, and nothing of its pixels."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x), device=x.device) * 3 // len(x)
        return F.one_hot(places, 3).float() + 0 * x.flatten(1)[:, :3]


class Neighbour(nn.Module):
    """Of each image a tenth of what stands before it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)[:, :32]
        return flat + 0.1 * flat.roll(1, 0)


class BatchMean(nn.Module):
    """Batch statistics by hand, which no norm policy knows of."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)[:, :32]
        return flat - flat.mean(0)


class Dropout(nn.Module):
    """Dropout that goes on at test."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.flatten(1)[:, :32], 0.5)


def episodes_of(config: Config, bank) -> EpisodeBatch:
    return open_episode_sets(config.data, config.episodes, bank, ("test",), CPU)["test"].load(
        range(3)
    )


def examined(make_config, bank, *overrides: str) -> Examination:
    config = make_config("examined", *overrides)
    learner = build_learner(config, bank.image_shape, 3, CPU)
    return examine_learner(learner, episodes_of(config, bank))


def examine_learner(learner: MetaLearner, episodes: EpisodeBatch) -> Examination:
    model = adapting(learner)
    return examine(model.by_step, model.company, episodes)


def protocol(config: Config, found: Examination) -> Protocol:
    return Protocol(spec=config.episodes.test, model=config.model, num_steps=2, examination=found)


def own(encoder: type[nn.Module]) -> list[str]:
    return [f"model.encoder={__name__}:{encoder.__name__}", "model.norm=none", "model.width=null"]


@pytest.mark.parametrize("norm", get_args(NormPolicy))
def test_every_norm_follows_its_images(make_config, tiny_bank, norm: str) -> None:
    """Transductive norms look at the other queries, but not at their order."""
    found = examined(make_config, tiny_bank, f"model.norm={norm}")
    assert found.caution == ""
    assert found.is_inductive is (norm != "transductive")


@pytest.mark.parametrize(
    ("encoder", "caution", "norm"),
    [
        (Flat, "", "inductive, measured on 3 episodes"),
        (ByPlace, "do not follow their images", "transductive, measured on 3 episodes"),
        (Neighbour, "do not follow their images", "transductive, measured on 3 episodes"),
        (BatchMean, "", "transductive, measured on 3 episodes"),
        (Dropout, "random at test", "not known to be inductive"),
    ],
)
def test_the_word_inductive_rests_on_a_measurement_of_an_own_encoder(
    make_config, tiny_bank, encoder, caution: str, norm: str
) -> None:
    found = examined(make_config, tiny_bank, *own(encoder))
    assert caution in found.caution
    assert bool(found.caution) == bool(caution)
    assert protocol(make_config("examined", *own(encoder)), found).norm == f"{norm} (none)"


def test_logits_that_are_no_numbers_prove_nothing(make_config, tiny_bank) -> None:
    found = examined(make_config, tiny_bank, "inner.lr=1e30", "inner.num_steps=5")
    assert found.caution == "caution: its logits are not finite numbers"
    assert found.is_inductive is None


def test_rounding_that_inner_steps_enlarge_is_no_place(make_config, tiny_bank) -> None:
    """At a rate of 5 the steps jump about; the early ones still tell."""
    found = examined(make_config, tiny_bank, "inner.lr=5", "inner.num_steps=8")
    assert "follow their images: they depend" not in found.caution


def by_place(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    return F.one_hot(torch.arange(len(query_x)) * 3 // len(query_x), 3).float()


def by_support_place(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(support_x) + 1)
    means = torch.stack([(support_x[support_y == way]).mean(0).flatten() for way in range(3)])
    return query_x.flatten(1) @ means.T * (1 + weights[support_y == 0].sum())


def by_company(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    return nearest_class_mean()(support_x, support_y, query_x - query_x.mean(0))


@pytest.mark.parametrize(
    ("predict", "caution", "inductive"),
    [
        (nearest_class_mean(), "", True),
        (by_place, "place of a query image", False),
        (by_support_place, "place of a support image", True),
        (by_company, "", False),
    ],
)
def test_other_peoples_models(
    make_config, tiny_bank, predict: Predict, caution: str, inductive: bool
) -> None:
    found = examine_predictions(predict, episodes_of(make_config("others"), tiny_bank))
    assert caution in found.caution
    assert bool(found.caution) == bool(caution)
    assert found.is_inductive is inductive


def test_a_model_that_needs_more_than_one_query_is_not_inductive(make_config, tiny_bank) -> None:
    """At 8 pixels the last feature map is 1x1: the moments of one query are those of one value."""
    config = make_config("resnet10", "model.encoder=resnet10", "cluster.memory_format=contiguous")
    learner = build_learner(config, (1, 8, 8), 3, CPU)
    episodes = episodes_of(config, tiny_bank)
    small = {name: vars(episodes)[name][..., ::2, ::2] for name in ("support_x", "query_x")}
    found = examine_learner(learner, replace(episodes, **small))
    assert found.company == float("inf")
    assert "more than 1 value per channel" in found.alone_error
    assert found.caution == "caution: it cannot predict one query alone"
    assert found.is_inductive is False
    assert protocol(config, found).is_transductive


def test_the_label_of_an_own_norm_gives_way_to_the_measurement(make_config) -> None:
    config = make_config("context", "model.norm=context")
    found = Examination(episodes=3, finite=True, **(NUMBERS | {"company": 0.5}))
    assert protocol(config, found).norm == "transductive, measured on 3 episodes (context)"
    same = found.model_copy(update={"company": 0.0})
    assert protocol(config, same).norm == "inductive (context)"


def test_what_an_examination_finds_costs_no_record(
    make_config, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def balanced(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        rows = query_x.view(3, 2, *query_x.shape[1:]).flatten(0, 1)  # 3 ways of 2 queries
        return nearest_class_mean()(support_x, support_y, rows)

    def fails_at_first(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        calls.append(len(query_x))
        if len(calls) < 2:
            raise ValueError("not warm yet")
        return nearest_class_mean()(support_x, support_y, query_x)

    config = make_config("run")
    usual, found, late = (
        raymaml.judge(predict, config, num_episodes=4)
        for predict in (nearest_class_mean(), balanced, fails_at_first)
    )
    assert found.accuracy.tolist() == late.accuracy.tolist() == usual.accuracy.tolist()
    assert found.examination is not None
    assert found.examination.is_inductive is False
    assert "predict: caution: it cannot predict one query alone" in caplog.text
    assert late.examination is None
    assert "predict: could not be examined (" in caplog.text
    assert "not warm yet" in caplog.text


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_type_are_measured_as_such(make_config, tiny_bank, half) -> None:
    """A row rounds otherwise by 2^-9 where its place is another: more than 1e-5, less than 5%."""

    def rounds(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        logits = nearest_class_mean()(support_x, support_y, query_x)
        return (logits * (1 + 2**-8 * (len(query_x) == 1))).to(half)

    episodes = episodes_of(make_config("half"), tiny_bank)
    found = examine_predictions(rounds, episodes)
    assert found.precision == "bf16"
    assert found.is_inductive
    whole = examine_predictions(lambda *images: rounds(*images).float(), episodes)
    assert whole.precision == "float32"
    assert whole.is_inductive is False


def test_judge_takes_the_precision_of_the_configuration(make_config) -> None:
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch starts
    config = make_config("bf16", "cluster.precision=bf16")
    found = raymaml.judge(nearest_class_mean(), config, num_episodes=2).examination
    assert found is not None
    assert found.precision == "bf16"
    assert not torch.backends.cudnn.allow_tf32


def a_run(make_config, *overrides: str) -> tuple[Config, dict, str]:
    config = make_config(
        "tested", "outer.num_steps=1", "evaluation.baseline_episodes=0", *overrides
    )
    assert train_locally(config, quiet)
    campaign = judge_run(config)
    path = write_test_report(campaign)
    return config, json.loads(path.read_text()), (path.parent / "report.md").read_text("utf-8")


def test_a_run_is_examined_and_its_report_says_what_was_found(make_config) -> None:
    config, summary, page = a_run(make_config, *own(ByPlace))
    caution = (
        "caution: its logits do not follow their images: they depend on the place of a query image"
        " in its batch"
    )
    assert summary["protocol"].endswith(f"single model | {caution}")
    assert "transductive, measured on 3 episodes (none)" in summary["protocol"]
    assert f"**model: {caution}.**" in page
    # the report is written again without the model
    again = plan_test(config, CPU)
    (found,) = again.folder.rglob(EXAMINATION_FILE)
    before = found.stat().st_mtime_ns
    assert json.loads(write_test_report(again).read_text())["protocol"] == summary["protocol"]
    assert found.stat().st_mtime_ns == before
    found.unlink()
    protocol = json.loads(write_test_report(again).read_text())["protocol"]
    assert protocol.endswith("caution: not examined whether its logits follow their images")


def test_dropout_at_test_is_repeated_whatever_the_chunks_and_the_past(make_config) -> None:
    config, _, _ = a_run(make_config, *own(Dropout))
    torch.manual_seed(99)
    assert replay(plan_test(config, CPU), quiet) == 10
    one_by_one = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"chunk_size": 1})}
    )
    whole = plan_test(config, CPU)
    (records,) = (result.records for result in whole.results())
    rmtree(whole.arms[0].records)
    judge_run(one_by_one)
    (again,) = (result.records for result in plan_test(one_by_one, CPU).results())
    assert again.drop(["seconds"]).equals(records.drop(["seconds"]))


def test_other_peoples_random_models_are_repeated(make_config) -> None:
    def guesses(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return torch.rand(len(query_x), 3)

    few, more = (raymaml.judge(guesses, make_config("g"), num_episodes=n) for n in (3, 8))
    assert few.loss.tolist() == more.loss[:3].tolist()
    assert len(set(more.loss.tolist())) == 8


def test_a_damaged_examination_is_refused(tmp_path: Path) -> None:
    found = Examination(episodes=3, finite=False, **(NUMBERS | {"rounding": float("inf")}))
    write_examination(tmp_path, found)
    assert read_examination(tmp_path) == found
    (tmp_path / EXAMINATION_FILE).write_text("{")
    with pytest.raises(UserError, match=rf"{EXAMINATION_FILE}: is damaged .*; move "):
        read_examination(tmp_path)
    assert read_examination(tmp_path / "elsewhere") is None
