"""The bank may change under a trained run: it is refused, or asked for and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_evaluation import judge_run
from helpers_faults import quiet

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import in_memory
from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_audit import audit_run
from raymaml.evaluation.run_test import plan_test
from raymaml.experiments.study import plan_study, run_study
from raymaml.experiments.study_file import read_study
from raymaml.reports.write import write_test_report
from raymaml.training.data import sample_shards
from raymaml.training.worker import train_locally
from tests.conftest import tiny_classes

CPU = torch.device("cpu")
SWAPPED = {"train-0": "test", "train-1": "test", "test-0": "train", "test-1": "train"}


@pytest.fixture
def run(make_config: Any) -> Config:
    config: Config = make_config("tiny", "outer.num_steps=1", "evaluation.baseline_episodes=0")
    assert train_locally(config, quiet)
    return config


def dealt(folder: Path, splits: dict[str, str] = SWAPPED, **names: str) -> ImageBank:
    """The tiny bank with classes in other splits, and by other names."""
    classes = [
        in_memory(
            names.get(each.name.replace("-", "_"), each.name),
            splits.get(each.name, each.split),
            *images,
        )
        for each, images in tiny_classes()
    ]
    return write_bank(folder, classes, source="dealt", licence="none", image_shape=(1, 16, 16))


def under(config: Config, bank: ImageBank, *, allowed: bool = False) -> Config:
    """The config with another bank, whose episodes are sampled."""
    shards = bank.folder.parent / f"{bank.folder.name}-shards"
    data = config.data.model_copy(update={"bank": bank.folder, "shards": shards})
    evaluation = config.evaluation.model_copy(update={"other_bank": allowed})
    changed = config.model_copy(update={"data": data, "evaluation": evaluation})
    assert len(list(sample_shards(changed.data, changed.episodes, bank))) == 3
    return changed


@pytest.mark.parametrize(
    ("splits", "names", "seen"),
    [
        (SWAPPED, {}, "trained on 2 of its 5 test classes"),  # train-0 and train-1
        (SWAPPED, {"train_0": "new", "train_1": "newer"}, "trained on 2 of its 5 test classes"),
        (
            {"val-0": "test", "test-0": "val"},
            {},
            "trained on 0 of its 5 test classes, and chosen by 1",
        ),
    ],
)
def test_another_bank_is_refused_with_the_number_of_classes_that_were_seen(
    run: Config, tmp_path: Path, splits: dict[str, str], names: dict[str, str], seen: str
) -> None:
    other = under(run, dealt(tmp_path / "dealt", splits, **names))
    for reader in (
        lambda: plan_test(other, CPU),
        lambda: audit_run(other, quiet),
        lambda: raymaml.load_learner(other),
    ):
        with pytest.raises(UserError) as caught:
            reader()
        (problem,) = caught.value.problems
        assert seen in problem
        assert str(tmp_path / "dealt") in problem
        assert "evaluation.other_bank: true" in problem


def test_pictures_of_test_in_other_splits_are_a_caution(run: Config, tmp_path: Path) -> None:
    """The import has named them in the header, which the hash does not cover."""
    bank = dealt(tmp_path / "same", {})
    leak = {"split": "test", "images": 40, "examples": ["a = b"]}
    overlaps = [
        leak | {"other": "train", "equal": 2, "near": 1},
        leak | {"other": "val", "equal": 0, "near": 4},
        leak | {"split": "val", "other": "train", "equal": 9, "near": 0},
    ]
    header = json.loads((bank.folder / "bank.json").read_text())
    found = header | {"duplicates": {"overlaps": overlaps}}
    (bank.folder / "bank.json").write_text(json.dumps(found))
    path = write_test_report(judge_run(under(run, ImageBank.open(bank.folder))))
    said = "caution: test images are in other splits as well (3 in train, 4 in val)"
    assert json.loads(path.read_text())["protocol"].endswith(f" | {said}")
    assert said in path.with_name("report.html").read_text()


def test_another_bank_that_is_allowed_is_reported(run: Config, tmp_path: Path) -> None:
    other = under(run, dealt(tmp_path / "dealt"), allowed=True)
    campaign = judge_run(other)
    path = write_test_report(campaign)
    summary = json.loads(path.read_text())
    said = "another bank than in training, trained on 2 of its 5 test classes"
    assert summary["protocol"].endswith(f" | {said}")
    assert summary["identity"]["test_classes_trained_on"] == 2
    for page in ("report.md", "report.html"):
        assert said in path.with_name(page).read_text(encoding="utf-8")
    assert raymaml.load_learner(other) is not None


def test_a_run_of_an_older_version_does_not_know_its_classes(run: Config, tmp_path: Path) -> None:
    path = run.run_folder / "run.json"
    identity = json.loads(path.read_text())
    del identity["classes"], identity["schema_version"]
    path.write_text(json.dumps(identity))
    assert plan_test(run, CPU).arms
    with pytest.raises(UserError, match="another bank than in training, whose classes are not"):
        plan_test(under(run, dealt(tmp_path / "dealt")), CPU)


def test_a_class_is_known_by_its_name_or_by_some_of_its_images(
    tiny_bank: ImageBank, tmp_path: Path
) -> None:
    (first, (images,)), *others = tiny_classes()
    changed = images.copy()
    changed[4] ^= 1  # the middle one of eight
    write = {"source": "x", "licence": "x", "image_shape": (1, 16, 16)}
    classes = [in_memory(first.name, first.split, changed), *others]
    other = write_bank(tmp_path / "other", classes, **write)
    assert other.class_digest(0) != tiny_bank.class_digest(0)
    assert other.class_digest(1) == tiny_bank.class_digest(1)
    assert len({tiny_bank.class_digest(each) for each in range(22)}) == 22
    assert np.array_equal(other.class_images(1), tiny_bank.class_images(1))


def test_an_arm_of_a_study_says_that_its_bank_is_another(
    run: Config, make_config: Any, tmp_path: Path
) -> None:
    make_config("st")
    bank = dealt(tmp_path / "dealt")
    text = (
        "name: s\ntitle: T\nconfig: config.yaml\nset: {outer.num_steps: 1}\narms:\n"
        f"  - {{name: a}}\n  - {{name: b, set: {{data.bank: {bank.folder}}}}}\n"
    )
    path = tmp_path / "st" / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"b: .*another bank than in training"):
        run_study(read_study(path), train=train_locally, judge=judge_locally, echo=quiet)
    assert not (tmp_path / "st" / "runs" / "tiny").exists()  # found before any training
    path.write_text(text.replace("data.bank", "evaluation.other_bank: true, data.bank"))
    run_study(read_study(path), train=train_locally, judge=judge_locally, echo=quiet)
    named = {arm.name: arm for arm in plan_study(read_study(path), CPU).results()}
    assert "trained on 2 of its 5 test classes" in str(named["b"].protocol)
    assert "another bank" not in str(named["a"].protocol)
