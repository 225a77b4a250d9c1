"""Study files: arms listed and crossed, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import Changes, load_config, load_study
from raymaml.config.study import StudyConfig

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/glyphs/quickstart.yaml"
SMALLEST = """\
name: s
title: T
config: c.yaml
"""


def study(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(SMALLEST + text, encoding="utf-8")
    return path


def understood(path: Path) -> StudyConfig:
    settings, problems = load_study(path)
    assert problems == []
    return settings


def test_the_smallest_study_has_one_arm(tmp_path: Path) -> None:
    (arm,) = understood(study(tmp_path)).crossed_arms()
    assert (arm.name, arm.model, arm.checkpoint, arm.set) == ("model", None, "best", {})


def test_arms_are_crossed_with_all_values(tmp_path: Path) -> None:
    text = """\
models: {one: {}, two: {model.norm: context}}
arms:
  - {name: a, model: one, set: {model.norm: episodic}}
  - {name: b, model: two}
cross: {episodes.test.num_queries: [1, 15], evaluation.inner.lr: [0.1, 0.2, 0.3]}
"""
    arms = list(understood(study(tmp_path, text)).crossed_arms())
    assert len(arms) == 2 * 2 * 3
    assert [arm.name for arm in arms[:2]] == ["a-num_queries=1-lr=0.1", "a-num_queries=1-lr=0.2"]
    assert arms[5].set == {
        "model.norm": "episodic",
        "episodes.test.num_queries": 15,
        "evaluation.inner.lr": 0.3,
    }
    assert {arm.model for arm in arms[6:]} == {"two"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: x\n", "s.yaml:4: nam is unknown; did you mean name?"),
        ("arms: []\n", "s.yaml:4: arms is []"),
        ("arms: [{name: a}, {name: a}]\n", "a is the name of 2 arms; give each its own"),
        (
            "arms: [{name: a, model: x}]\nmodels: {m: {}}\n",
            "a: model is 'x'; it must be one of m",
        ),
        (
            "arms: [{name: a, set: {outer.lr: 1}}]\n",
            "a: outer.lr decides training; set it under `models`",
        ),
        (
            "models: {m: {seeds: [0, 0]}}\n",
            "s.yaml:4: models: seeds is [0, 0]; it should be a",
        ),
        (f"models: {{m: {{seeds: {list(range(101))}}}}}\n", "it should be a list of 1 to 100"),
        ("models: {m: {seeds: [0, -1, true]}}\n", "models: seeds is [0, -1, True]; it should be"),
        ("models: {m: {seed: 1, seeds: [0, 1]}}\n", "a model has seed and seeds; give one of them"),
        (
            "models: {m: {seeds: [0, 1]}}\narms: [{name: a}, {name: a-seed1, checkpoint: x}]\n",
            "a-seed1 is the name of 2 arms; give each its own",
        ),
        (
            "checks: [{kind: difference, claim: c, arm: model, minus: y, expect: within}]\n",
            "'c' names the arm 'y'; it must be one of model",
        ),
        (
            "checks: [{kind: guess, claim: c}]\n",
            "s.yaml:4: checks.0.kind is 'guess'; it should be one of 'difference',"
            " 'first trials', 'precision'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = load_study(study(tmp_path, text))[1]
    assert message in problem


def test_crossed_values_are_counted_before_they_are_made(tmp_path: Path) -> None:
    keys = ", ".join(f"inner.{key}: {list(range(1000))}" for key in ("lr", "head_lr", "num_steps"))
    with pytest.raises(UserError, match="cross: it makes 1,000,000,000 arms, and a study has 1,0"):
        load_study(study(tmp_path, f"cross: {{{keys}}}\n"))


def test_correct_parts_are_understood_beside_wrong_ones(tmp_path: Path) -> None:
    text = """\
models: {one: {}, two: {inner.lr: 0.2}}
arms:
  - {name: a, model: one, checkpoint: 3, set: {outer.lr: 1}}
  - {name: b, model: three}
checks:
  - {kind: difference, claim: c, arm: a, minus: y, expect: within, margin: -1}
  - {kind: difference, claim: d, arm: a, minus: z, expect: within}
tite: x
"""
    path = study(tmp_path, text.replace("name: b", "name: b, sett: {}"))
    settings, problems = load_study(path)
    assert [problem.removeprefix(str(tmp_path)) for problem in problems] == [
        "/s.yaml:6: arms.0.checkpoint is 3; it should be a path, or a URI such as"
        ' s3://bucket/folder; if it is text, quote it: "3"',
        "/s.yaml:7: arms.1.sett is unknown; did you mean set?",
        "/s.yaml:9: checks.0.margin is -1; it should be greater than or equal to 0",
        "/s.yaml:11: tite is unknown; did you mean title?",
        "/s.yaml: arms: b: model is 'three'; it must be one of one, two",
        "/s.yaml: arms: a: outer.lr decides training; set it under `models`",
        "/s.yaml: checks: 'c' names the arm 'y'; it must be one of a, b",
        "/s.yaml: checks: 'd' names the arm 'z'; it must be one of a, b",
    ]
    assert [arm.name for arm in settings.arms] == ["a", "b"]


def test_an_arm_that_could_not_be_read_is_not_called_unknown(tmp_path: Path) -> None:
    text = """\
arms: [{name: a}, {nam: b}]
checks: [{kind: difference, claim: c, arm: a, minus: b, expect: within}]
"""
    problems = load_study(study(tmp_path, text))[1]
    assert len(problems) == 2, problems  # no name, and nam is unknown; not that b is no arm


def test_keys_that_a_study_must_have_are_missed_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("arms: [{name: a, model: x}]", encoding="utf-8")
    missed = ["name is missing", "title is missing", "config is missing", "model is 'x'"]
    problems = load_study(path)[1]
    assert len(problems) == len(missed)
    assert all(text in problem for text, problem in zip(missed, problems, strict=True))


def test_changes_of_a_study_go_before_the_command_line(tmp_path: Path) -> None:
    changes = Changes("s.yaml: set", {"outer.lr": 0.5, "model": {"norm": "context"}})
    config = load_config(QUICKSTART, changes, ["outer.lr=0.25"])
    assert (config.outer.lr, config.model.norm, config.model.width) == (0.25, "context", None)


def test_a_mistake_in_the_changes_is_named_by_the_study(tmp_path: Path) -> None:
    changes = Changes("s.yaml: arms: a", {"model.nrm": "context", "inner.lr": -1})
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, changes)
    assert sorted(caught.value.problems) == [
        "s.yaml: arms: a: inner.lr is -1; it should be greater than or equal to 0",
        "s.yaml: arms: a: model.nrm is unknown; did you mean norm?",
    ]


def test_keys_that_are_no_text_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_study(study(tmp_path, "1: 2\nnull: 3\ntrue: 4\n"))
    assert str(caught.value).count(" is no key, since keys are text; ") == 2
