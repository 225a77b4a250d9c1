"""Any other model: the same episodes, the same records."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers_evaluation import judge_run
from helpers_faults import quiet
from torch import Tensor
from torch.nn import functional as F

import raymaml
from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank
from raymaml.evaluation import judge as judging
from raymaml.evaluation.campaign import replay
from raymaml.evaluation.records import record_arrays
from raymaml.evaluation.run_test import plan_test
from raymaml.reports.write import write_test_report
from raymaml.training.data import sample_shards
from raymaml.training.state import build_learner
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")


@pytest.fixture
def config(make_config):
    """A run of one outer step."""
    config = make_config("run", "outer.num_steps=1", "model.norm=context")
    assert train_locally(config, quiet)
    return config


def test_a_run_judged_as_somebody_elses_model_has_the_same_records(config) -> None:
    judge_run(config)
    campaign = plan_test(config, CPU)
    own = record_arrays(campaign.results()[0].records)
    others = raymaml.judge(raymaml.predictor(raymaml.load_learner(config)), config)
    for column in ("accuracy", "loss", "class_ids", "query_rows", "bin_correct", "brier"):
        assert np.array_equal(getattr(own, column), getattr(others, column)), column
    assert others.accuracy_by_step.shape == (10, 1)
    assert raymaml.paired(own, others, ("own", "others")).difference.mean == 0


def test_a_model_that_sees_only_the_place_of_an_image_is_at_chance(make_config, tiny_bank) -> None:
    """2 of 3 ways are wrong; 40 episodes of 3 * 6 queries have a standard error below 1.8%."""
    queries = ["episodes.test.num_queries=6", "episodes.test.num_episodes=40"]
    config = make_config("place", *queries)

    def by_place(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        places = torch.arange(len(query_x))
        return F.one_hot(places * 3 // len(query_x), 3).float()

    assert abs(raymaml.judge(by_place, config).accuracy.mean() - 1 / 3) < 4 * 0.018


def test_nearest_class_mean_on_pixels_and_on_features(config) -> None:
    pixels = raymaml.judge(raymaml.nearest_class_mean(), config)
    features = raymaml.features(raymaml.load_learner(config))
    encoded = raymaml.judge(raymaml.nearest_class_mean(features), config, num_episodes=7)
    # the patterns of the tiny bank are far apart: pixels suffice
    assert pixels.accuracy.mean() > 0.9
    assert encoded.accuracy.mean() > 0.6
    assert raymaml.paired(encoded, pixels, ("encoded", "pixels")).difference.count == 7


def test_features_are_computed_in_the_precision_of_the_learner(make_config, tiny_bank) -> None:
    images = torch.rand(6, 1, 16, 16)
    found = []
    for precision in ("float32", "bf16"):
        config = make_config("half", f"cluster.precision={precision}")
        learner = build_learner(config, tiny_bank.image_shape, 3, CPU)
        found.append(raymaml.features(learner)(images[:3], torch.arange(3), images[3:])[1])
    exact, half = found
    assert half.dtype == torch.float32
    # bfloat16 has 8 bits: it is off by up to 2^-9 in each of 4 convolutions
    assert not torch.allclose(exact, half, rtol=1e-4, atol=1e-4)
    assert torch.allclose(exact, half, rtol=0.2, atol=0.2)


def test_the_clock_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU only the calls are counted here: work is given to it at once, and done later."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    judging.seconds_after_all(CPU)
    assert not calls
    judging.seconds_after_all(torch.device("cuda", 1))
    assert calls == [torch.device("cuda", 1)]


def test_features_are_what_the_head_sees(config) -> None:
    learner = raymaml.load_learner(config)
    images = torch.rand(5, 1, 16, 16)
    support, query = raymaml.features(learner)(images[:3], torch.arange(3), images[3:])
    assert support.shape == (3, 4)  # 4 channels of one pixel
    assert query.shape == (2, 4)
    # with no inner step the head is where it starts
    logits = query @ learner.params["head.weight"].T + learner.params["head.bias"]
    inner = learner.test_inner.model_copy(update={"num_steps": 0})
    still = raymaml.MetaLearner(learner.model, learner.inner, test_inner=inner, channels_last=True)
    expected = raymaml.predictor(still)(images[:3], torch.arange(3), images[3:])
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.zeros(6, 2), r"torch.float32 of shape \[6, 2\]"),
        (torch.zeros(6, 3, dtype=torch.int64), r"torch.int64 of shape \[6, 3\]"),
        ([0, 1], "list"),
    ],
)
def test_other_results_than_logits_are_refused(make_config, returned, found) -> None:
    with pytest.raises(UserError, match=f"predict: returned {found} for episode 0; it must"):
        raymaml.judge(lambda *_: returned, make_config("run"))


@pytest.mark.parametrize("count", [0, 11])
def test_the_number_of_episodes_has_bounds(make_config, count) -> None:
    with pytest.raises(UserError, match=f"num_episodes is {count}; .* holds 10 test episodes"):
        raymaml.judge(raymaml.nearest_class_mean(), make_config("run"), num_episodes=count)


@pytest.mark.fault("NaN: evaluation")
def test_logits_that_are_not_numbers_are_records_all_the_same(make_config) -> None:
    found = raymaml.judge(lambda *_: torch.full((6, 3), torch.nan), make_config("run"))
    assert (found.accuracy == 0).all()  # argmax says class 0, which a third is
    assert np.isnan(found.loss).all()
    assert np.isnan(found.brier).all()
    assert found.bin_count.sum() == 60


def test_every_record_repeats(config) -> None:
    with pytest.raises(UserError, match="20 episodes in 7 chunks are not judged yet"):
        replay(plan_test(config, CPU), quiet)
    judge_run(config)
    lines: list[str] = []
    assert replay(plan_test(config, CPU), lines.append) == 20
    assert lines[0] == "model: 10 records repeated bit for bit"


def test_an_altered_record_does_not_repeat(config, monkeypatch) -> None:
    judge_run(config)
    campaign = plan_test(config, CPU)
    results = campaign.results()
    table = results[0].records
    losses = table.column("loss").to_numpy().copy()
    losses[4] = np.nextafter(losses[4], 1)  # one unit in the last place
    place = table.schema.get_field_index("loss")
    altered = table.set_column(place, "loss", [losses])
    results[0] = type(results[0])(**{**vars(results[0]), "records": altered})
    monkeypatch.setattr(type(campaign), "results", lambda _self: results)
    with pytest.raises(UserError, match="model: episode 4 was recorded with loss") as caught:
        replay(campaign, quiet)
    assert len(caught.value.problems) == 1  # the other arms repeat


def with_test(config, **changes):
    episodes = config.episodes
    test = episodes.test.model_copy(update=changes)
    return config.model_copy(update={"episodes": episodes.model_copy(update={"test": test})})


def test_fewer_test_episodes_than_were_sampled_are_the_first_ones(config) -> None:
    judge_run(config)
    whole = record_arrays(plan_test(config, CPU).results()[0].records)
    fewer = with_test(config, num_episodes=4)
    lines: list[str] = []
    campaign = judge_run(fewer, lines.append)
    path = write_test_report(campaign)
    assert json.loads(path.read_text())["num_episodes"] == 4
    assert not [line for line in lines if "CPU worker" in line]  # 4 of 10 are there
    some = record_arrays(plan_test(fewer, CPU).results()[0].records)
    assert np.array_equal(some.accuracy, whole.accuracy[:4])
    assert len(raymaml.judge(raymaml.nearest_class_mean(), fewer).accuracy) == 4
    bank = ImageBank.open(config.data.bank)  # sampling keeps them all
    counts = [shards.count for shards in sample_shards(fewer.data, fewer.episodes, bank)]
    assert counts == [24, 4, 10]


def test_test_episodes_that_the_bank_cannot_give_are_found_before_training(make_config) -> None:
    config = with_test(make_config("late"), num_shots=7)
    with pytest.raises(UserError, match=r"num_shots . num_queries = 9"):
        train_locally(config, quiet)
    assert not config.run_folder.exists()
