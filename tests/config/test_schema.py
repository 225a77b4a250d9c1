"""The schema: legal values, derived values, and the keys that a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from raymaml.config.explain import models_in
from raymaml.config.inner import InnerConfig, InnerOverride
from raymaml.config.schema import AllEpisodes, Config
from raymaml.config.study import StudyConfig
from raymaml.config.sweep import SweepConfig


def tree() -> dict[str, Any]:
    """The smallest config: the keys without a default."""
    return {
        "name": "a",
        "data": {"source": {"kind": "glyphs"}, "bank": "bank", "shards": "shards"},
        "episodes": {split: {"num_episodes": 1} for split in ("train", "val", "test")},
        "outer": {"num_steps": 1},
    }


def make(**sections: dict[str, Any]) -> Config:
    """The smallest config with keys of some sections changed."""
    changed = tree()
    for section, keys in sections.items():
        changed[section] = {**changed.get(section, {}), **keys}
    return Config.model_validate(changed)


def test_defaults_are_the_papers() -> None:
    config = make()
    assert config.run_folder == Path("runs/a")
    train = config.episodes.train
    assert (train.num_ways, train.num_shots, train.num_queries) == (5, 1, 15)
    assert (config.inner.num_steps, config.inner.lr, config.inner.gradient) == (5, 0.01, "auto")
    outer = config.outer
    assert (outer.optimizer, outer.lr, outer.meta_batch_size) == ("adam", 1e-3, 4)
    assert (config.evaluation.checkpoint, config.cluster.num_workers) == ("best", "auto")


def test_zero_inner_steps_and_zero_rates_are_legal() -> None:
    config = make(inner={"num_steps": 0, "lr": 0, "head_lr": 0})
    assert (config.inner.num_steps, config.inner.lr, config.inner.head_lr) == (0, 0.0, 0.0)


def test_an_override_of_zero_is_applied_and_null_is_not() -> None:
    inner = InnerConfig(num_steps=5, lr=0.4, head_lr=0.1)
    changed = InnerOverride(num_steps=0, head_lr=0.0).apply(inner)
    assert (changed.num_steps, changed.lr, changed.head_lr) == (0, 0.4, 0.0)
    assert InnerOverride().apply(inner) == inner


def test_test_inner_is_inner_with_the_overrides_of_evaluation() -> None:
    config = make(inner={"lr": 0.4}, evaluation={"inner": {"num_steps": 10}})
    assert (config.test_inner.num_steps, config.test_inner.lr) == (10, 0.4)
    assert config.inner.num_steps == 5


def test_evaluation_may_take_other_support_batches_than_training() -> None:
    """Reptile trains on 10 of 5 x 15 support images a step, and tests on 5 of 5 x 1."""
    shots = {"train": {"num_episodes": 1, "num_shots": 15}}
    reptile = {"episodes": shots, "inner": {"support_batch_size": 10}}
    with pytest.raises(ValidationError, match=r"evaluation.inner.support_batch_size .*val has 5 "):
        make(**reptile)
    config = make(**reptile, evaluation={"inner": {"support_batch_size": 5}})
    assert (config.inner.support_batch_size, config.test_inner.support_batch_size) == (10, 5)
    with pytest.raises(ValidationError, match=r"\binner.support_batch_size is 10.*train has 5 "):
        make(inner={"support_batch_size": 10}, evaluation={"inner": {"support_batch_size": 5}})


def test_6000_episodes_are_tested_by_default() -> None:
    few = {"train": {"num_episodes": 1}, "val": {"num_episodes": 1}}
    for given, expected in [({}, 6000), ({"num_shots": 5}, 6000), ({"num_episodes": 7}, 7)]:
        assert AllEpisodes(**few, test=given).test.num_episodes == expected
    assert AllEpisodes(**few).test.num_episodes == 6000
    with pytest.raises(ValidationError, match="num_episodes"):
        AllEpisodes(train={}, val={"num_episodes": 1})


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("outer", {"num_steps": 0}),
        ("outer", {"num_steps": True}),
        ("outer", {"lr": 0}),
        ("outer", {"lr": float("nan")}),
        ("outer", {"clip_value": 0}),
        ("outer", {"optimizer": "sgd", "momentum": 1}),
        ("inner", {"num_steps": -1}),
        ("inner", {"lr": float("inf")}),
        ("cluster", {"num_workers": 0}),
        ("inner", {"lr": True}),
        ("outer", {"schedule": "step", "milestones": [5]}),
        ("model", {"norm": {"*": "batch"}}),
        ("model", {"encoder": "resnet13"}),
        ("model", {"encoder": "my.module:Encoder", "width": 8}),
        ("model", {"width": [1, 2, 3, 4]}),
        ("model", {"encoder": "resnet12", "width": [1, 2]}),
        ("data", {"image_size": 7}),
    ],
)
def test_settings_that_make_no_sense_are_refused(section: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(**{section: keys})


def test_a_learned_head_keeps_its_ways() -> None:
    other = {"test": {"num_episodes": 1, "num_ways": 3}}
    with pytest.raises(ValidationError, match=r"model\.head is learned"):
        make(episodes=other)
    assert make(episodes=other, model={"head": "zero"}).episodes.test.num_ways == 3


def test_models_are_frozen() -> None:
    config = make()
    with pytest.raises(ValidationError):
        config.outer.num_steps = 3  # type: ignore[misc]


def test_every_field_has_a_description() -> None:
    found = {}
    waiting: list[type[BaseModel]] = [Config, StudyConfig, SweepConfig]
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            sections = models_in(field.annotation)  # have docstrings
            waiting += sections
            if not sections and name not in ("kind", "train", "val", "test"):
                found[f"{model.__name__}.{name}"] = field.description
    assert len(found) >= 80
    assert [name for name, text in found.items() if not text] == []


FREE: list[tuple[str, dict[str, Any]]] = [
    ("cluster", {"num_workers": 3, "max_failures": 9}),
    ("evaluation", {"chunk_size": 7}),
    ("outer", {"log_every": 1, "validate_every": 2, "checkpoint_every": 3, "keep_best": 4}),
    ("outer", {"num_steps": 99}),
    ("data", {"bank": "elsewhere"}),
]
DECIDING: list[tuple[str, dict[str, Any]]] = [
    ("model", {"width": 8}),
    ("inner", {"lr": 0.2}),
    ("outer", {"meta_batch_size": 5}),
    ("data", {"normalize": "none"}),
    ("cluster", {"precision": "bf16"}),
    ("cluster", {"memory_format": "contiguous"}),
    ("cluster", {"episodes_per_chunk": 2}),
    ("cluster", {"deterministic": True}),
    ("cluster", {"reduction": "fast"}),
    ("cluster", {"threads_per_worker": 2}),
]


def test_the_fingerprint_has_the_settings_that_decide_the_weights() -> None:
    def fingerprint(section: str = "outer", **keys: Any) -> dict[str, Any]:
        return make(**{section: keys}).learning

    assert all(fingerprint(section, **keys) == fingerprint() for section, keys in FREE)
    assert all(fingerprint(section, **keys) != fingerprint() for section, keys in DECIDING)
    # one by one, as auto on a CPU: runs of before these keys go on
    assert fingerprint("cluster", episodes_per_chunk=1) == fingerprint()
    assert not {"deterministic", "reduction"} & fingerprint()["cluster"].keys()
    # under a schedule the number of steps decides, too
    long, short = (fingerprint(schedule="cosine", num_steps=steps) for steps in (20, 10))
    assert long != short
    assert fingerprint(schedule="cosine", final_lr=1e-5) != fingerprint(schedule="cosine")


def test_records_of_before_a_key_keep_their_name() -> None:
    """Later keys with their default leave no trace; with another value they do."""
    before = (
        '{"num_steps":5,"lr":0.01,"head_lr":null,"momentum":0.0,"weight_decay":0.0,"frozen":[],'
        '"gradient":"auto"}'
    )
    assert InnerConfig().of_records() == before
    assert '"rule":"adam"' in InnerConfig(rule="adam").of_records()
