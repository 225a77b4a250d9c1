"""Ray Train: the same bits as a lone process, for any number of workers; errors of users."""

from __future__ import annotations

import pytest
import torch
from helpers_cluster import attempts, trained_steps
from helpers_faults import quiet

from raymaml.cluster.train import train_on_cluster
from raymaml.cluster.trainer import RAY_SNAPSHOT
from raymaml.common.errors import UserError
from raymaml.training.data import open_training_data
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray


EVERYTHING = (  # that is drawn, accumulated or kept from step to step
    "model.norm=running",
    "model.head=shared",
    "inner.momentum=0.5",
    "inner.gradient=checkpointed",
    "outer.optimizer=rmsprop",
    "outer.warmup_steps=3",
    "data.augment.train.support=crop",
    "data.augment.train.query=resize",
    "data.augment.val.query=crop",
)


MAML_PLUS_PLUS = (  # with each part; the first-order steps end in the run
    "model.norm={policy: running, per_step: both}",
    "inner.rates=per_tensor_per_step",
    "inner.multi_step_loss={num_outer_steps: 10, num_stages: 5}",
    "inner.first_order_steps=4",
    "inner.support_batch_size=2",
    "outer.schedule=cosine",
    "outer.final_lr=1e-5",
    "outer.rule_lr=1e-2",
)


@pytest.mark.parametrize("keys", [EVERYTHING, MAML_PLUS_PLUS], ids=["everything", "MAML++"])
def test_workers_end_in_the_bits_of_a_lone_process(cluster, make_config, same_as_alone, keys):
    """Three workers: 1 + 1 + 0, one only helps to validate; 13 steps of 2 are 26 of 24 episodes."""
    steps = ("cluster.num_workers=3", "outer.meta_batch_size=2", "outer.num_steps=13", *keys)
    together = make_config("run", "name=together", *steps)

    assert train_on_cluster(together, quiet)

    same_as_alone(together, *steps)


def test_workers_pretrain_to_the_bits_of_a_lone_process(cluster, make_config, same_as_alone):
    """Two workers: two slices of 4 images and one."""
    section = "{num_steps: 5, batch_size: 12, slice_size: 4, validate_every: 3, augment: crop}"
    steps = ("stage=pretrain", f"pretrain={section}", "model.norm=running", "model.head=zero")
    together = make_config("run", "name=together", "cluster.num_workers=2", *steps)

    assert train_on_cluster(together, quiet)

    same_as_alone(together, "cluster.num_workers=2", *steps)


@pytest.mark.fault("checkpoint torn")
def test_a_torn_ray_snapshot_does_not_matter_and_a_finished_run_stays_as_it_is(
    cluster, make_config, same_as_alone
):
    """Two workers, a chunk of 2 episodes each; 7 steps of 4 are 28 of 24 episodes."""
    chunks = ("inner.gradient=mixed_mode", "cluster.episodes_per_chunk=2", "cluster.num_workers=2")
    steps = ("outer.meta_batch_size=4", *chunks)
    half = make_config("run", "name=resumed", "outer.num_steps=3", *steps)
    whole = make_config("run", "name=resumed", "outer.num_steps=7", *steps)
    assert train_locally(half, quiet)
    (half.run_folder / RAY_SNAPSHOT).write_text('{"ray_version": "2.6')

    assert train_on_cluster(whole, quiet)

    same_as_alone(whole, "outer.num_steps=7", *steps)
    written = {each: each.stat().st_mtime_ns for each in whole.run_folder.glob("checkpoint_*/*")}
    metrics = (whole.run_folder / "metrics.jsonl").read_bytes()
    lines: list[str] = []
    assert train_on_cluster(whole, lines.append)
    assert [each for each in written if each.stat().st_mtime_ns != written[each]] == []
    assert (whole.run_folder / "metrics.jsonl").read_bytes() == metrics
    assert [line for line in lines if line.startswith("step")] == []


@pytest.mark.fault("NaN: training")
def test_a_user_error_of_all_workers_is_shown_and_not_tried_again(cluster, make_config):
    rates = ("inner.lr=1e30", "evaluation.inner.lr=0.1")  # training alone is not finite
    config = make_config("run", *rates, "cluster.num_workers=2")

    with pytest.raises(UserError) as raised:
        train_on_cluster(config, quiet)

    # every worker sees the outcomes of all; this seed's training starts with episodes 5, 6 and 7
    assert open_training_data(config, torch.device("cpu")).names(0)[0] == "training episode 5"
    message = "outer step 0: training episode 5 gave a loss or gradient that is not finite; "
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(message)
    assert attempts(config.run_folder) == 1


@pytest.mark.fault("checkpoint damaged")
def test_a_user_error_of_one_worker_ends_the_others(cluster, make_config):
    """Rank 0 finds a damaged checkpoint in its way; rank 1 waits for its next gradients."""
    config = make_config(
        "run", "outer.num_steps=80", "outer.validate_every=40", "cluster.num_workers=2"
    )
    in_the_way = config.run_folder / "checkpoint_00000040"

    def put_in_the_way(line: str) -> None:
        if line.startswith("step") and not in_the_way.exists():
            assert trained_steps(config.run_folder) < 40
            in_the_way.mkdir()
            (in_the_way / "checkpoint.json").write_text("{")

    with pytest.raises(UserError) as raised:
        train_on_cluster(config, put_in_the_way)

    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(f"{in_the_way / 'checkpoint.json'}: is damaged")
    assert attempts(config.run_folder) == 1
