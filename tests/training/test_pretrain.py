"""Pretraining: plain learning by the same loop, whose bits no worker and no kill changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers_training import CPU, Killed, result, run, run_with_workers
from torch.nn import functional as F

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.models import build_model
from raymaml.training.checkpoint import find_checkpoint, read_card, weights_of
from raymaml.training.data import open_training_data
from raymaml.training.images import LabelledImages
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.plain import plain_gradients
from raymaml.training.run import open_run
from raymaml.training.state import build_classifier, load_params
from raymaml.training.trained import open_trained
from raymaml.training.weights import start_from_weights

SECTION = (
    "pretrain={num_steps: 5, batch_size: 12, slice_size: 4, lr: 0.01, log_every: 1,"
    " validate_every: 3, augment: crop}"
)
"""Steps of three slices; validations before steps 0 and 3 and after 4."""
FIRST = "encoder.conv1.conv.weight"


@pytest.fixture
def config(make_config: Any) -> Config:
    pretraining: Config = make_config("tiny", SECTION).pretraining
    return pretraining


def slices(config: Config) -> LabelledImages:
    found = open_training_data(config, CPU).train
    assert isinstance(found, LabelledImages)
    return found


def test_an_epoch_has_each_training_image_once_under_its_class(
    config: Config, tiny_bank: ImageBank
) -> None:
    """12 classes of 8 images are 96: 24 slices of 4, or 19 slices of 5 and 1 image of the next."""
    rows = [slices(config).rows(index) for index in range(48)]
    drawn = np.concatenate([each.query for each in rows])
    of_train = [*range(tiny_bank.first_row[12])]
    assert sorted(drawn[:96]) == sorted(drawn[96:]) == of_train
    assert list(drawn[:96]) != list(drawn[96:])
    assert [each.query_labels.tolist() for each in rows] == [
        (each.query // 8).tolist() for each in rows
    ]
    fives = replace(slices(config), slice_size=5)
    assert np.array_equal(np.concatenate([fives.rows(i).query for i in range(20)]), drawn[:100])


def test_a_slice_is_a_function_of_seed_and_number(config: Config, make_config: Any) -> None:
    (alone,), (_, among) = slices(config).load(range(7, 8)), slices(config).load(range(6, 8))
    assert torch.equal(alone.query_x, among.query_x)
    assert torch.equal(alone.query_y, among.query_y)
    assert alone.query_x.shape == (4, 1, 16, 16)
    plain, other = (
        slices(make_config("tiny", SECTION, each).pretraining)
        for each in ("pretrain.augment=none", "seed=4")
    )
    assert np.array_equal(plain.rows(7).query, slices(config).rows(7).query)
    assert not torch.equal(plain.load(range(7, 8)).query_x[0], alone.query_x)  # cropped by chance
    assert not np.array_equal(other.rows(7).query, plain.rows(7).query)


@pytest.mark.parametrize("norm", ["transductive", "running", "context", "layer"])
def test_the_gradient_is_that_of_cross_entropy_over_all_classes(
    make_config: Any, norm: str
) -> None:
    config = make_config("tiny", SECTION, f"model.norm={norm}", "model.head=zero").pretraining
    learner = build_classifier(config, (1, 16, 16), 12, CPU)
    batch = slices(config).load(range(2))
    results = plain_gradients(learner, batch)
    for found, images, labels in zip(results, batch.query_x, batch.query_y, strict=True):
        loss = F.cross_entropy(learner.model(images), labels)  # in training mode, by its batch
        wanted = torch.autograd.grad(loss, list(learner.params.values()))
        torch.testing.assert_close(found.loss, loss.detach())
        for name, gradient in zip(learner.params, wanted, strict=True):
            torch.testing.assert_close(found.grads[name], gradient, rtol=1e-4, atol=1e-6)
    assert learner.params["head.weight"].shape == (12, 4)
    assert bool(results[0].buffers) == (norm == "running")


def stopped(config: Config) -> None:
    run(config, stop_during=1)


def killed(config: Config) -> None:
    with pytest.raises(Killed):
        run(config, die_before=4)


@pytest.mark.parametrize("disturbed", [None, stopped, killed])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_worker_and_no_stop_changes_a_bit(
    make_config: Any,
    tmp_path: Path,
    disturbed: Callable[[Config], None] | None,
    workers: int,
) -> None:
    """Three slices: 3, 2 + 1, 1 + 1 + 1 + 0. Norms that keep moments, and a shared head."""
    overrides = (SECTION, "model.norm=running", "model.head=shared")
    config = make_config("tiny", *overrides, "pretrain.checkpoint_every=1").pretraining
    run(config)
    other = config.model_copy(update={"run_dir": tmp_path / "other"})
    if disturbed:
        disturbed(other)
    run_with_workers(other, workers)
    assert result(other.run_folder) == result(config.run_folder)


def test_it_learns_and_is_validated_by_class_means(make_config: Any) -> None:
    """From the logarithm of 12 classes down; the accuracy is that of the arithmetic by hand."""
    steps = "{num_steps: 40, batch_size: 32, lr: 0.01, log_every: 1, validate_every: 20}"
    config = make_config("tiny", f"pretrain={steps}").pretraining
    folder = run(config)
    losses = [
        row["query_loss"] for row in read_metrics(folder / METRICS_FILE) if "grad_norm" in row
    ]
    assert losses[0] == pytest.approx(math.log(12), rel=0.1)
    assert losses[-1] < 0.7 * losses[0]

    last = find_checkpoint(folder, "last")
    card, opened = read_card(last), open_run(config, CPU)
    load_params(opened.learner, weights_of(last, CPU))
    encoder, right = opened.learner.model.encoder, []
    for episode in opened.data.val.load(range(4)):
        support, query = encoder(episode.support_x), encoder(episode.query_x)
        means = torch.stack([support[episode.support_y == way].mean(0) for way in range(3)])
        nearest = (query[:, None] - means).square().sum(-1).argmin(1)
        right.append((nearest == episode.query_y).float().mean().item())
    assert card.validation is not None
    assert card.validation.accuracy == pytest.approx(np.mean(right))
    assert card.best is not None
    assert card.best.accuracy >= card.validation.accuracy


def test_the_command_resumes_and_its_run_folder_names_the_run(make_config: Any) -> None:
    config = make_config("tiny", SECTION, "pretrain.checkpoint_every=1")
    stopped(config.pretraining)
    path = config.run_dir.parent / "config.yaml"
    outcome = CliRunner().invoke(main, ["pretrain", str(path), "--local"])
    assert outcome.exit_code == 0, outcome.output
    first, *lines, last = outcome.output.splitlines()
    folder = config.run_dir / "tiny-pretrain"
    assert first.endswith("cross-entropy over 12 classes, 3 slices of 4 images a step")
    assert lines[0].startswith("step 3/5  loss ")
    assert " images/s  " in lines[0]
    assert last.startswith(f"{folder}: done; best validation accuracy ")
    kept = load_config(folder / "config.yaml")
    assert kept == kept.pretraining == config.pretraining
    again = CliRunner().invoke(main, ["train", str(folder / "config.yaml"), "--local"])
    assert again.output.splitlines() == [last]
    assert json.loads((folder / "run.json").read_text("utf-8"))["stage"] == "pretrain"


@pytest.mark.parametrize("head", ["zero", "shared", "learned"])
def test_a_pretraining_is_a_model_for_use_where_the_head_starts_at_zero(
    make_config: Any, head: str
) -> None:
    folder = run(make_config("tiny", SECTION, f"model.head={head}").pretraining)
    if head == "zero":
        weights = weights_of(find_checkpoint(folder, "best"), CPU)
        assert torch.equal(open_trained(folder, CPU).learner.params[FIRST], weights[FIRST])
        return
    with pytest.raises(UserError, match=rf"is of a pretraining.*weights: {folder}\)"):
        open_trained(folder, CPU)


def test_what_does_not_decide_its_weights_may_change(make_config: Any) -> None:
    config = make_config("tiny", SECTION)
    run(config.pretraining)
    path = config.run_dir.parent / "config.yaml"
    free = ("inner.lr=0.3", "outer.lr=0.3", "pretrain.num_steps=6", "cluster.episodes_per_chunk=2")
    outcome = CliRunner().invoke(main, ["pretrain", str(path), *free, "--local"])
    assert outcome.exit_code == 0, outcome.output
    outcome = CliRunner().invoke(main, ["pretrain", str(path), "pretrain.slice_size=6", "--local"])
    assert outcome.exit_code == 2
    message = "was started with pretrain.slice_size = 4, the config now says 6; "
    assert message in outcome.output


def test_training_starts_from_its_best_encoder(make_config: Any) -> None:
    own = ("model.weights=pretrain", "model.head=shared", "inner.num_steps=1")
    config = make_config("tiny", SECTION, "pretrain.checkpoint_every=1", *own)
    first, last = config.stages
    assert (first, last) == (config.pretraining, config)
    assert first.model.weights is None
    for state in ("holds no checkpoint", "stands before step 2 of 5"):
        with pytest.raises(UserError, match=f"tiny-pretrain {state}; run `raymaml pretrain"):
            open_run(config, CPU)
        stopped(first)
    run(first)
    best = weights_of(find_checkpoint(first.run_folder, "best"), CPU)
    params = open_run(config, CPU).learner.params
    assert params["head.weight"].shape == (1, 4)
    assert len(params) == len(best) == 18
    assert all(torch.equal(best[name], params[name]) for name in best if "encoder" in name)
    run(config)
    assert not torch.equal(
        weights_of(find_checkpoint(last.run_folder, "last"), CPU)[FIRST], best[FIRST]
    )


def test_its_head_is_left_behind_though_it_fits(make_config: Any) -> None:
    """Of 12 training classes and 12 ways; the rows of an episode are other classes."""
    config = make_config("tiny", SECTION, "model.weights=pretrain")
    run(config.pretraining)
    network = build_model(config.model, image_shape=(1, 16, 16), num_ways=12, seed=0)
    before = network.head.weight.detach().clone()
    start = start_from_weights(config, network, (1, 16, 16))
    assert torch.equal(network.head.weight, before)
    assert start.text.endswith("left over pretrain.head.bias, pretrain.head.weight")


@pytest.mark.parametrize("by", ["word", "folder"])
def test_one_config_pretrains_trains_and_tests_by_the_commands(make_config: Any, by: str) -> None:
    """`model.weights` may name the run of pretraining before there is one."""
    base = make_config("tiny")
    folder = base.run_dir / "tiny-pretrain"
    weights = "pretrain" if by == "word" else str(folder)
    path = str(base.run_dir.parent / "config.yaml")
    config = make_config("tiny", SECTION, "outer.num_steps=2", f"model.weights={weights}")

    def outcome(command: str, code: int, *overrides: str) -> list[str]:
        found = CliRunner().invoke(main, [command, path, "--local", *overrides])
        assert found.exit_code == code, found.output
        return found.output.splitlines()

    (early,) = outcome("train", 2)
    assert str(folder) in early
    assert "`raymaml pretrain" in early
    assert not config.run_dir.exists()
    *_, pretrained = outcome("pretrain", 0)
    assert outcome("pretrain", 0) == [pretrained]
    assert outcome("pretrain", 0, "model.weights=null") == [pretrained]  # it is the same run
    best = find_checkpoint(folder, "best")
    params, wanted = open_run(config, CPU).learner.params, weights_of(best, CPU)
    assert all(torch.equal(params[name], wanted[name]) for name in params if "encoder" in name)
    first, *_, last = outcome("train", 0)
    assert first.startswith(f"{config.run_folder}: starts from {best} (sha256 ")
    assert first.endswith(": 16 tensors; left over pretrain.head.bias, pretrain.head.weight")
    assert outcome("train", 0) == [last]
    headline, summary = outcome("test", 0)[-2:]
    assert " accuracy on 10 test episodes" in headline
    assert Path(summary).is_file()


def test_mistakes(make_config: Any) -> None:
    with pytest.raises(UserError, match="pretrain is missing: the config does not say how"):
        _ = make_config("tiny").pretraining
    with pytest.raises(
        UserError, match="stage: pretrain, but there is no section pretrain; add it"
    ):
        make_config("tiny", "stage=pretrain")
    with pytest.raises(UserError, match=r"batch_size is 12 and pretrain\.slice_size is 5"):
        make_config("tiny", SECTION, "pretrain.slice_size=5")
    with pytest.raises(UserError, match=r"pretrain\.momentum is 0\.9 but pretrain\.optimizer is"):
        make_config("tiny", SECTION, "pretrain.momentum=0.9")
    far = make_config("far", SECTION, "pretrain.lr=1e30").pretraining
    with pytest.raises(UserError) as raised:
        run(far)
    assert raised.value.problems == (
        "outer step 1: slice 3 of the images gave a loss or gradient that is not finite; the last"
        " checkpoint is kept; lower pretrain.lr, or set pretrain.clip_norm, under another name",
    )
