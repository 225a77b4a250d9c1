"""Contracts 2 and 3 without Ray: no number of workers and no kill changes a bit."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_encoders import Scales
from helpers_training import (
    CPU,
    Disturbed,
    Group,
    Killed,
    ThreadSession,
    result,
    run,
    run_with_workers,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank
from raymaml.training import loop, store
from raymaml.training.checkpoint import find_checkpoint, list_steps, saved_step, weights_of
from raymaml.training.data import TrainingData, open_training_data
from raymaml.training.explain import require_exact
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.reduction import read
from raymaml.training.run import open_run
from raymaml.training.session import LocalSession
from raymaml.training.state import build_learner, build_state, initial_state
from raymaml.types import EpisodeBatch, tensors_of

STEPS = 6  # outer steps of the tiny config, validations before steps 0, 3 and after 5


def poisoned(batch: EpisodeBatch) -> EpisodeBatch:
    """The second episode has a query image that is not a number."""
    query = batch.query_x.clone()
    query[1, 0, 0, 0, 0] = float("nan")
    return replace(batch, query_x=query)


def opened(config: Config) -> TrainingData:
    return open_training_data(config, CPU)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_bank: ImageBank) -> Path:
    """The run folder that nothing happened to; shards and config lie beside it."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def config(make_config: Any, undisturbed: Path) -> Config:
    """The tiny config with shards that all tests here share, and a run folder of its own."""
    config: Config = make_config(undisturbed)
    if not config.run_folder.exists():
        run(config)
    return config


@pytest.fixture
def fresh(config: Config, tmp_path: Path) -> Config:
    return config.model_copy(update={"run_dir": tmp_path / "runs"})


def test_a_run_validates_logs_and_keeps_what_the_config_says(config: Config) -> None:
    _, step, validation, best, rows, (steps, _) = result(config.run_folder)
    assert step == validation.step == STEPS
    assert [row["step"] for row in rows if "val_accuracy" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "query_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert best.accuracy == max(row["val_accuracy"] for row in rows if "val_accuracy" in row)
    assert set(steps) == {STEPS, best.step}
    # weights and metrics change with every step
    params = weights_of(find_checkpoint(config.run_folder, "last"), CPU)
    state = build_state(config, (1, 16, 16), CPU)
    assert not any(torch.equal(value, params[name]) for name, value in state.params.items())
    assert len({row["query_loss"] for row in rows if "query_loss" in row}) == STEPS


def stopped(config: Config, *during: int) -> None:
    for step in during:
        run(config, stop_during=step)
        assert saved_step(config.run_folder) == step + 1


def killed(config: Config, saved: int, **kill: int) -> None:
    """Leave what a kill may tear as well."""
    with pytest.raises(Killed):
        run(config, **kill)
    assert saved_step(config.run_folder) == saved
    half = config.run_folder / ".checkpoint_00000005.partial-00ff"
    half.mkdir()
    (half / "params.safetensors").write_bytes(b"half")
    with (config.run_folder / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "query_lo')


def with_outer(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"outer": config.outer.model_copy(update=changes)})


def with_two_workers_from_step_2_on(config: Config) -> None:
    stopped(config, 1)
    run_with_workers(config, 2)


# 3 episodes and 4 validation episodes: 2+1 and 2+2, 1+1+1 and 2+1+1, 1+1+1+0 and 1+1+1+1
WAYS: dict[str, Callable[[Config], object]] = {
    **{f"{n} workers": partial(run_with_workers, world_size=n) for n in (1, 2, 3, 4)},
    "another number of workers": with_two_workers_from_step_2_on,
    "stopped after every step": lambda config: stopped(config, *range(STEPS)),
    "killed before step 0": lambda config: killed(config, 0, die_before=0),
    "killed before step 5": lambda config: killed(config, 3, die_before=5),
    "killed while it saves step 0": lambda config: killed(config, 0, die_at_report=1),
    "killed while it saves step 3": lambda config: killed(config, 3, die_at_report=2),
    "checkpoints between validations save work": (
        lambda config: killed(with_outer(config, checkpoint_every=2), 4, die_before=5)
    ),
    "made longer": lambda config: run(with_outer(config, num_steps=3)),
}


@pytest.mark.fault("driver killed")
@pytest.mark.fault("checkpoint torn")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_ends_in_the_same_bits(config: Config, fresh: Config, way: str) -> None:
    WAYS[way](fresh)
    run(fresh)
    assert result(fresh.run_folder) == result(config.run_folder)
    assert not [*fresh.run_folder.glob(".*partial*")]


@pytest.mark.fault("driver killed")
def test_kills_leave_the_same_best_checkpoints(
    fresh: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turn before a save drops another checkpoint, and after a save."""
    three = with_outer(fresh, validate_every=1, keep_best=3)
    whole = run(three.model_copy(update={"run_dir": tmp_path / "whole"}))
    kept = result(whole)[-1]
    found = {row["step"]: row.get("val_accuracy") for row in read_metrics(whole / METRICS_FILE)}
    ranked = sorted(found, key=lambda step: (-found[step], step))
    assert (kept[0], len(kept[1])) == (sorted({STEPS, *ranked[:3]}), 2)

    def killed_before(path: Path, last: str) -> None:
        raise Killed

    kills = 0
    while not three.run_folder.exists() or saved_step(three.run_folder) < STEPS:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(store, "remove_folder", killed_before)
            run(three)
        with contextlib.suppress(Killed):
            run(three, die_at_report=2)
        kills += 1
    run(three)
    assert kills > 1
    assert result(three.run_folder) == result(whole)


def test_a_finished_run_is_left_as_it_is(config: Config) -> None:
    before = result(config.run_folder)
    times = {path: path.stat().st_mtime_ns for path in config.run_folder.glob("checkpoint_*/*")}
    run(config)
    assert result(config.run_folder) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_chunks_of_episodes_are_the_same_for_any_number_of_workers(
    make_config: Any, tmp_path: Path
) -> None:
    # 5 episodes in chunks of 2, 2, 1: by 1 worker, 4 + 1, 2 + 2 + 1 and 2 + 2 + 1 + 0
    chunks = ("cluster.episodes_per_chunk=2", "outer.meta_batch_size=5", "outer.num_steps=2")
    # PyTorch has one level of dual numbers for all threads: mixed_mode needs processes
    config = make_config(tmp_path, *chunks, "inner.gradient=checkpointed")
    lone = result(run(config))
    for world_size in (2, 3, 4):
        runs = tmp_path / f"by {world_size}"
        folder = run_with_workers(config.model_copy(update={"run_dir": runs}), world_size)
        assert result(folder) == lone


class Reads(TorchDispatchMode):
    """Counts the looks at a number of a tensor, for each of which a GPU's queue would run dry."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_outer_step_reads_all_its_numbers_at_once(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Adam counts its steps on the CPU, so SGD."""
    options = ("outer.optimizer=sgd", "outer.clip_norm=1.0", f"cluster.episodes_per_chunk={chunk}")
    opened = open_run(make_config("a", *options), CPU)
    state = initial_state(opened.learner, opened.config.outer)
    session = LocalSession(opened.data, CPU)
    taken: list[set[str]] = []
    monkeypatch.setattr(loop, "read", lambda numbers: (taken.append({*numbers}), read(numbers))[1])
    with contextlib.closing(session.meta_batches(0)) as batches, Reads() as reads:
        shown, stops = loop.meta_step(state, next(batches), opened, session)
    assert taken == [{"loss", "accuracy", "stop", "grad_norm", "finite"}]
    assert reads.count == 0
    assert shown.keys() == {"query_loss", "query_accuracy", "grad_norm"}
    assert not stops
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.count == 1


def test_another_seed_gives_other_bits(config: Config, make_config: Any) -> None:
    # so the equalities above are not those of a constant
    other = run(make_config("other", "seed=4"))
    assert result(other)[0] != result(config.run_folder)[0]


def test_replicas_share_all_episodes_and_differ_in_weights_order_and_augmentation(
    make_config: Any,
) -> None:
    """Runs of seeds 3 and 4, of the same shards, for 24 episodes each."""
    change = "data.augment.%s.query=color"
    changes = [change % split for split in ("train", "val")]
    one, other = (make_config("both", *changes, f"seed={seed}") for seed in (3, 4))
    first, second = opened(one), opened(other)
    assert first.train.shards.manifest_hash == second.train.shards.manifest_hash
    # val: bit-equal, augmentation included
    for name, value in tensors_of(first.val.load(range(4))).items():
        assert torch.equal(value, vars(second.val.load(range(4)))[name])
    # train: the same 24 episodes, from another one on, and other draws of the augmentation
    assert (first.indices(0, 0, 1), second.indices(0, 0, 1)) == (range(5, 8), range(14, 17))
    here, there = (data.train.load(range(5, 6)) for data in (first, second))
    assert torch.equal(here.support_x, there.support_x)
    assert not torch.equal(here.query_x, there.query_x)
    weights = [build_state(config, (1, 16, 16), CPU).digest() for config in (one, other)]
    assert weights[0] != weights[1]


WAYS_OUT = {
    "done": ({}, None),
    "stopped": ({"stop_during": 2}, None),
    "killed while it learns": ({"die_before": 2}, Killed),
    "killed while it saves": ({"die_at_report": 2}, Killed),
    "a loss that is not finite": ({"change": poisoned}, UserError),
}


@pytest.mark.fault("NaN: training")
@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_thread_outlives_the_loop(fresh: Config, way: str) -> None:
    disturbance, error = WAYS_OUT[way]
    before = threading.enumerate()  # fsspec keeps one, if another test has needed it
    with pytest.raises(error) if error else contextlib.nullcontext() as caught:
        run(fresh, **disturbance)
    # the error is held, and with it the frames of the loop
    assert [thread for thread in threading.enumerate() if thread not in before] == []
    if error is UserError:
        (problem,) = caught.value.problems
        # 24 episodes, 3 a step, the first is fold_in(3, "order") % 24 = 5: the second of step 2
        assert problem.startswith("outer step 2: training episode 12 gave a loss or gradient that")
        assert "lower inner.lr, outer.lr or outer.rule_lr" in problem
        assert list_steps(fresh.run_folder) == [0, 2]  # the best, and the state before that step


@pytest.mark.slow
def test_training_ends_well_where_reading_is_slower_than_learning(make_config: Any) -> None:
    """A thread that is inside PyTorch when the interpreter exits would abort the process."""
    config = make_config(
        "slow reading",
        "data.augment.train={support: color, query: color}",
        "episodes.train={num_ways: 12, num_queries: 7, num_episodes: 24}",  # 96 images each
        "model.head=zero",
        "inner.num_steps=1",
        "outer={num_steps: 2, meta_batch_size: 16, log_every: 1, validate_every: 2}",
    )
    path = config.run_dir.parent / "config.yaml"
    for number in range(3):
        command = [sys.executable, "-m", "raymaml", "train", str(path), "--local"]
        done = subprocess.run(
            [*command, f"name=run-{number}"], check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert ": done; best validation accuracy" in done.stdout.splitlines()[-1]


def test_training_goes_round_again_when_episodes_run_out(make_config: Any) -> None:
    data = opened(make_config("few", "episodes.train.num_episodes=4"))
    batches = data.meta_batches(0, 0, 1)
    first, second, third = (next(batches) for _ in range(3))
    batches.close()
    # seed 3 starts with episode 1 of 4: steps learn from 1 2 3 | 0 1 2 | 3 0 1
    assert torch.equal(second.support_x[1:], first.support_x[:2])
    assert torch.equal(third.query_x[0], first.query_x[2])
    assert torch.equal(third.query_x[1], second.query_x[0])
    assert not torch.equal(second.support_x[0], first.support_x[0])


def test_materialised_episodes_give_the_same_bits(config: Config, make_config: Any) -> None:
    folder = run(make_config("pixels", "data.materialize=true"))
    assert result(folder) == result(config.run_folder)


class PoisonedValidation(Disturbed):
    """Every row of validation, a loss and an accuracy, has lost its loss in the second episode."""

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        gathered = super().gather(rows, sizes).clone()
        if gathered.shape[1] == 2:
            gathered[1, 0] = float("nan")
        return gathered


@pytest.mark.fault("NaN: validation")
def test_a_validation_loss_that_is_not_finite_stops_the_run(fresh: Config) -> None:
    with pytest.raises(UserError) as caught:
        run(fresh, PoisonedValidation)
    (problem,) = caught.value.problems
    assert problem.startswith("outer step 0: validation episode 1 gave a loss that is not finite")
    assert list_steps(fresh.run_folder) == []


def with_encoder(make_config: Any, place: str, name: str, *overrides: str) -> Config:
    model = f'model={{encoder: "helpers_encoders:{name}", norm: none}}'
    config: Config = make_config(place, model, *overrides)
    return config


@pytest.mark.parametrize("method", ["auto", "mixed_mode"])
def test_the_comparison_of_methods_changes_no_bit(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An own encoder with random numbers and a counter, in one go and in two."""
    way = f"inner.gradient={method}"
    checked = run(with_encoder(make_config, "checked", "Smooth", way))
    stopped = with_encoder(make_config, "stopped", "Smooth", way)
    run(stopped, stop_during=3)
    run(stopped)
    monkeypatch.setattr("raymaml.training.loop.require_exact", lambda *_: None)
    unchecked = run(with_encoder(make_config, "unchecked", "Smooth", way))
    assert result(checked)[:-1] == result(unchecked)[:-1]
    assert result(stopped.run_folder)[:-1] == result(unchecked)[:-1]


def test_workers_agree_on_an_own_encoder(make_config: Any) -> None:
    way = "inner.gradient=checkpointed"
    wanted = result(run(with_encoder(make_config, "one", "Plain", way)))
    assert result(run_with_workers(with_encoder(make_config, "three", "Plain", way), 3)) == wanted
    wrong = with_encoder(make_config, "wrong", "Scales", "inner.gradient=mixed_mode")
    with pytest.raises(UserError, match=r"mixed_mode gives .* set inner.gradient: unrolled"):
        run_with_workers(wrong, 3)


def test_a_comparison_that_fails_on_one_worker_ends_all(make_config: Any) -> None:
    """Rank 1 alone meets an error; without a word to the others they would wait for it."""
    config = with_encoder(make_config, "run", "Plain", "inner.gradient=checkpointed")
    data, group = opened(config), Group(3)
    said: dict[int, str] = {}

    def worker(rank: int) -> None:
        session = ThreadSession(data, rank, group)
        learner = build_learner(config, data.image_shape, 3, CPU)
        if rank == 1:
            learner.model.encoder.linear = nn.Linear(255, 4)
        try:
            require_exact(learner, config.model, data.image_shape, 3, session)
        except (UserError, RuntimeError) as error:
            said[rank] = str(error)

    group.run(worker)
    assert "mat1 and mat2" in said[1]
    for rank in (0, 2):
        assert f"failed on worker 1 and not on worker {rank}" in said[rank]


def test_a_resumed_run_compares_the_methods_again(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_encoder(make_config, "run", "Scales", "inner.gradient=mixed_mode")
    with monkeypatch.context() as earlier:
        earlier.setattr(Scales, "left_out", False)
        run(config, stop_during=3)
    before = result(config.run_folder)
    with pytest.raises(UserError, match=r"mixed_mode gives a meta-gradient of length .* unrolled"):
        run(config)
    assert result(config.run_folder) == before


@pytest.mark.parametrize(
    ("encoder", "method", "says"),
    [
        ("Scales", "mixed_mode", "unrolled one of length"),
        ("Attends", "auto", "no second derivative"),
        ("Grouped", "mixed_mode", "set inner.gradient: checkpointed"),
        ("Two", "first_order", "model.encoder: Two turns 3 images into a tuple in training mode"),
    ],
)
def test_an_own_encoder_that_cannot_be_trained_is_one_message(
    make_config: Any, encoder: str, method: str, says: str, tmp_path: Path
) -> None:
    with_encoder(make_config, "run", encoder, f"inner.gradient={method}")
    ended = CliRunner().invoke(main, ["train", "--local", str(tmp_path / "run/config.yaml")])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert says in line
