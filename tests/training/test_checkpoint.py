"""Checkpoints: whole or absent, readable, refused by name when damaged, never unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers_trained import as_before

from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.training.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    find_checkpoints,
    list_steps,
    read_card,
)
from raymaml.training.identity import identity_of
from raymaml.training.origin import require_same_model
from raymaml.training.session import LocalSession
from raymaml.training.state import TrainState, Validation, build_state
from raymaml.training.store import CheckpointStore

CPU = torch.device("cpu")
SHAPE = (1, 16, 16)
TENSORS = ("params.safetensors", "optimizer.pt")
ALONE = LocalSession(None, CPU)  # type: ignore[arg-type]  # no episode is read here


@pytest.fixture
def config(make_config: Any) -> Config:
    return make_config()


@pytest.fixture
def store(tmp_path: Path, config: Config) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run", identity_of(config, SHAPE, "b" * 64))


def state_at(config: Config, step: int) -> TrainState:
    """A state with weights and optimizer state that differ from those of a new one."""
    state = build_state(config, SHAPE, CPU)
    for parameter in state.params.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step = step
    return state


def judged(step: int, accuracy: float) -> Validation:
    return Validation(step=step, accuracy=accuracy, ci95=0.1, loss=1.0)


def test_restoring_gives_back_every_bit(config: Config, store: CheckpointStore) -> None:
    state, other = state_at(config, 4), build_state(config, SHAPE, CPU)
    digest = other.digest()
    store.restore(other, ALONE)  # there is no checkpoint yet
    assert (other.step, other.digest()) == (0, digest)
    # of one episode: its interval is infinite, which JSON has no number for
    state.record(Validation(step=4, accuracy=0.25, ci95=math.inf, loss=2.0))
    store.save(state, ALONE)
    text = (checkpoint_path(store.folder, 4) / "checkpoint.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert digest != state.digest()
    store.restore(other, ALONE)
    assert other.digest() == state.digest()
    assert (other.step, other.validation, other.best) == (4, state.validation, state.best)
    saved, restored = (each.optimizer.state_dict()["state"] for each in (state, other))
    assert len(saved) == len(state.params)
    for number, entry in saved.items():
        assert len(entry) == 3  # Adam: step and two moments
        assert all(torch.equal(value, restored[number][name]) for name, value in entry.items())


def test_a_person_can_read_a_checkpoint(config: Config, store: CheckpointStore) -> None:
    state = state_at(config, 7)
    state.record(judged(7, 0.5))
    store.save(state, ALONE)
    folder = checkpoint_path(store.folder, 7)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "optimizer.pt",
        "params.safetensors",
    ]
    card = json.loads((folder / "checkpoint.json").read_text())
    assert card["step"] == 7
    assert card["validation"] == {"step": 7, "accuracy": 0.5, "ci95": 0.1, "loss": 1.0}
    assert card["config"]["outer"]["num_steps"] == 6
    assert card["bank_hash"] == "b" * 64
    assert set(card["versions"]) == {"raymaml", "torch", "python"}
    for name, sha256 in card["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    # it alone is enough to evaluate, and no library but safetensors is needed
    params = safetensors.torch.load_file(folder / "params.safetensors")
    wanted = state.params | state.learner.moments
    assert {name: value.shape for name, value in params.items()} == {
        name: value.shape for name, value in wanted.items()
    }
    assert all(torch.equal(params[name], value) for name, value in wanted.items())


def test_the_last_and_the_best_are_kept(config: Config, store: CheckpointStore) -> None:
    state, kept = state_at(config, 0), []
    for step, accuracy in enumerate([0.3, 0.5, 0.4, 0.5, 0.6, 0.1]):
        state.step = step
        state.record(judged(step, accuracy))
        store.save(state, ALONE)
        kept.append(list_steps(store.folder))
    # 0.5 of step 3 is not better than 0.5 of step 1: the older one stays
    assert kept == [[0], [1], [1, 2], [1, 3], [4], [4, 5]]
    assert find_checkpoint(store.folder, "last").name == "checkpoint_00000005"
    assert find_checkpoint(store.folder, "best").name == "checkpoint_00000004"
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_the_last_and_the_three_best_are_kept(config: Config, store: CheckpointStore) -> None:
    state, kept = state_at(config, 0), []
    for step, accuracy in enumerate([0.3, 0.5, 0.4, 0.5, 0.6, 0.1, 0.5]):
        state.step = step
        state.record(judged(step, accuracy), keep_best=3)
        store.save(state, ALONE)
        kept.append(list_steps(store.folder))
        store.restore(state, ALONE)
    # step 3 drops 0.3 of step 0; 0.5 of step 6 is not better than 0.5 of steps 1 and 3
    assert kept == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [1, 3, 4], [1, 3, 4, 5], [1, 3, 4, 6]]
    found = find_checkpoints(store.folder, "ensemble")
    assert [path.name[-1] for path in found] == ["4", "1", "3"]
    card = read_card(checkpoint_path(store.folder, 6))
    assert card.best == judged(4, 0.6)
    assert card.runners_up == (judged(1, 0.5), judged(3, 0.5))
    # fewer are kept from now on
    state.step = 7
    state.record(judged(7, 0.5))
    store.save(state, ALONE)
    assert list_steps(store.folder) == [4, 7]
    assert find_checkpoints(store.folder, "ensemble") == (checkpoint_path(store.folder, 4),)


RUNNERS_UP = {
    "in another order": (lambda each: each[::-1], "are not in the order of accuracy"),
    "one twice": (lambda each: [each[0], each[0]], "are not in the order of accuracy"),
    "better than the best": (
        lambda each: [{**each[0], "accuracy": 0.9}],
        "are not in the order of accuracy",
    ),
    "later": (
        lambda each: [*each, {**each[1], "accuracy": 0.2, "step": 7}],
        r"runners_up are of steps \[7\], validation.step is 2",
    ),
    "of another accuracy": (
        lambda each: [{**each[0], "accuracy": 0.45}],
        r"accuracy=0.4.*, but runners_up\[0\] of .*accuracy=0.45",
    ),
}


@pytest.mark.parametrize(("change", "says"), RUNNERS_UP.values(), ids=RUNNERS_UP)
def test_runners_up_that_cannot_be_are_refused(
    config: Config, store: CheckpointStore, change: Callable[[Any], Any], says: str
) -> None:
    state = state_at(config, 0)
    for step, accuracy in enumerate([0.5, 0.4, 0.3]):
        state.step = step
        state.record(judged(step, accuracy), keep_best=3)
        store.save(state, ALONE)
    path = checkpoint_path(store.folder, 2) / "checkpoint.json"
    card = json.loads(path.read_text())
    card["runners_up"] = change(card["runners_up"])
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match=says):
        find_checkpoints(store.folder, "ensemble")


def test_a_runner_up_that_is_not_there_is_named(config: Config, store: CheckpointStore) -> None:
    state = state_at(config, 0)
    for step in range(2):
        state.step = step
        state.record(judged(step, 0.5), keep_best=2)
        store.save(state, ALONE)
    shutil.rmtree(checkpoint_path(store.folder, 1))
    shutil.copytree(checkpoint_path(store.folder, 0), checkpoint_path(store.folder, 2))
    card = json.loads((checkpoint_path(store.folder, 0) / "checkpoint.json").read_text())
    card |= {"step": 2, "validation": {**card["validation"], "step": 1}}
    card["runners_up"] = [{**card["best"], "step": 1}]
    (checkpoint_path(store.folder, 2) / "checkpoint.json").write_text(json.dumps(card))
    with pytest.raises(UserError) as caught:
        find_checkpoints(store.folder, "ensemble")
    assert str(caught.value).endswith(
        f"runners_up[0].step is 1, but {checkpoint_path(store.folder, 1)} is not there; restore it"
        " from a copy, or judge the best one by evaluation.checkpoint=best"
    )
    assert find_checkpoint(store.folder, "best") == checkpoint_path(store.folder, 0)


def test_a_run_without_validation_or_checkpoint(config: Config, store: CheckpointStore) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; run `raymaml train CONFIG` first"):
        find_checkpoint(store.folder, "best")
    store.save(state_at(config, 3), ALONE)
    assert find_checkpoint(store.folder, "best") == checkpoint_path(store.folder, 3)


def test_steps_are_ordered_as_numbers_and_foreign_folders_ignored(tmp_path: Path) -> None:
    names = ["checkpoint_00000009", "checkpoint_100000000", "checkpoint_x", "checkpoint_5"]
    for name in [*names, ".checkpoint_00000010.partial-0"]:
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [9, 100_000_000]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    *((damage, name) for damage in (flip, truncate, Path.unlink) for name in TENSORS),
    *((damage, "checkpoint.json") for damage in (truncate, Path.unlink)),
]


@pytest.mark.fault("checkpoint damaged")
@pytest.mark.parametrize(("damage", "name"), DAMAGE)
def test_a_damaged_file_is_named_with_the_remedy(
    config: Config, store: CheckpointStore, damage: Callable[[Path], object], name: str
) -> None:
    store.save(state_at(config, 2), ALONE)
    folder = checkpoint_path(store.folder, 2)
    damage(folder / name)
    state = build_state(config, SHAPE, CPU)
    digest = state.digest()
    with pytest.raises(UserError) as caught:
        store.restore(state, ALONE)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder / name}: is damaged (")
    assert f"move {folder} away" in problem
    assert (state.step, state.digest()) == (0, digest)


def test_a_card_of_another_schema_is_named(tmp_path: Path) -> None:
    for content, says in {
        "[]": "has schema_version None, this raymaml reads 1 to 3",
        '{"schema_version": 4}': "has schema_version 4, this raymaml reads 1 to 3",
        '{"schema_version": 1}': "is damaged (",
    }.items():
        (tmp_path / "checkpoint.json").write_text(content)
        with pytest.raises(UserError) as caught:
            read_card(tmp_path)
        assert f"{tmp_path / 'checkpoint.json'}: {says}" in str(caught.value)


class Bomb:
    """What a malicious pickle does: run something when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_run_even_with_the_right_hash(
    tmp_path: Path, config: Config, store: CheckpointStore
) -> None:
    store.save(state_at(config, 2), ALONE)
    folder, mark = checkpoint_path(store.folder, 2), tmp_path / "it-was-run"
    (folder / "params.safetensors").unlink()
    as_before(folder, {"encoder.conv1.conv.weight": Bomb(mark)})
    with pytest.raises(UserError, match=r"params\.pt: is damaged \(it holds more than tensors"):
        store.restore(build_state(config, SHAPE, CPU), ALONE)
    assert not mark.exists()
    torch.load(folder / "params.pt", weights_only=False)  # the bomb is a live one
    assert mark.exists()


def test_weights_that_differ_between_workers_are_not_saved(
    config: Config, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return torch.cat([rows, rows + 1])

    monkeypatch.setattr(ALONE, "gather", gather)
    with pytest.raises(RuntimeError, match="outer step 3: the workers' weights differ"):
        store.save(state_at(config, 3), ALONE)
    assert list_steps(store.folder) == []


def test_the_same_step_saved_again_takes_the_validation_along(
    config: Config, store: CheckpointStore
) -> None:
    """A run stopped before a validation step writes a checkpoint; its continuation judges it."""
    state = state_at(config, 3)
    store.save(state, ALONE)
    before = (checkpoint_path(store.folder, 3) / "checkpoint.json").stat().st_ino
    store.save(state, ALONE)
    assert (checkpoint_path(store.folder, 3) / "checkpoint.json").stat().st_ino == before
    state.record(judged(3, 0.5))
    weights = (checkpoint_path(store.folder, 3) / "params.safetensors").stat()
    store.save(state, ALONE)
    card = read_card(checkpoint_path(store.folder, 3))
    assert card.validation == card.best == judged(3, 0.5)
    # the only checkpoint there is: it is never away, not even for a moment
    assert (checkpoint_path(store.folder, 3) / "params.safetensors").stat() == weights


def test_all_that_keeps_weights_from_fitting_a_model_is_named(
    config: Config, store: CheckpointStore, make_config: Any
) -> None:
    store.save(state_at(config, 3), ALONE)
    path = checkpoint_path(store.folder, 3)
    require_same_model(path, config.model, config.episodes.test.num_ways, SHAPE)
    episodes = [f"episodes.{split}.num_ways=4" for split in ("train", "val", "test")]
    other = make_config("other", "model.width=8", *episodes)
    with pytest.raises(UserError) as caught:
        require_same_model(path, other.model, 4, (3, 16, 16))
    assert len(caught.value.problems) == 3
    for text in (
        "model.width = 4, config and bank now say 8",
        "the image shape (C, H, W) = (1, 16, 16), config and bank now say (3, 16, 16)",
        "num_ways = 3, config and bank now say 4",
    ):
        assert text in str(caught.value)
