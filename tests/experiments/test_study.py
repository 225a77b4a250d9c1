"""Studies and campaigns that grow, stop early, and refuse what does not fit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers_faults import quiet
from pyarrow import parquet

from raymaml.common.errors import UserError
from raymaml.data.sampling import by_label
from raymaml.evaluation.campaign import Campaign, judge_locally
from raymaml.evaluation.run_test import plan_test
from raymaml.experiments.study import plan_study, run_study
from raymaml.experiments.study_file import read_study
from raymaml.reports.write import headline_of, write_test_report
from raymaml.statistics.confidence_sequence import any_look_interval
from raymaml.statistics.intervals import bounded_interval
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")
STUDY = """\
name: s
title: T
config: config.yaml
set: {outer.num_steps: 1}
models:
  one: {}
  two: {inner.lr: 0.2}
arms:
  - {name: a, model: one}
  - {name: b, model: two, set: {model.norm: context}}
  - {name: untrained, checkpoint: initial}
checks:
  - {kind: difference, claim: c, arm: a, minus: b, expect: within, margin: 1}
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def run(path: Path, *overrides: str) -> tuple[Path | None, int]:
    """Run a study and return its summary and how many episodes were judged."""
    before = chunk_files(path.parent)
    study = read_study(path, overrides)
    found = run_study(study, train=train_locally, judge=judge_locally, echo=quiet)
    written = [file for file, at in chunk_files(path.parent).items() if before.get(file) != at]
    return found, sum(parquet.read_metadata(file).num_rows for file in written)


def chunk_files(folder: Path) -> dict[Path, int]:
    """Return when each chunk was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}


def test_a_study_pretrains_each_training_that_starts_from_it(make_config, tmp_path) -> None:
    config = make_config("st", "pretrain={num_steps: 1, batch_size: 4, slice_size: 2}")
    two = "two: {model.weights: pretrain, model.head: shared, seeds: [0, 1]}"
    summary, count = run(write(tmp_path / "st", STUDY.replace("two: {inner.lr: 0.2}", two)))
    assert summary is not None
    assert count == 4 * 10
    runs = sorted(folder.name for folder in config.run_dir.iterdir())
    seeds = [
        "tiny-two-seed0",
        "tiny-two-seed0-pretrain",
        "tiny-two-seed1",
        "tiny-two-seed1-pretrain",
    ]
    assert runs == ["studies", "tiny", *seeds]


def test_a_study_trains_judges_and_never_repeats(make_config, tmp_path) -> None:
    config = make_config("st")
    path = write(tmp_path / "st")
    summary, count = run(path)
    assert summary == config.run_dir / "studies" / "tiny" / "s" / "summary.json"
    assert count == 3 * 10
    runs = sorted(folder.name for folder in config.run_dir.iterdir())
    assert runs == ["studies", "tiny", "tiny-two"]
    before = chunk_files(summary.parent.parent)

    assert run(path)[1] == 0
    # five episodes more of each arm: the episodes of before are those of before
    assert run(path, "episodes.test.num_episodes=15")[1] == 3 * 5
    # an arm more, that has the weights and settings of another: nothing to judge
    write(tmp_path / "st", STUDY.replace("checks:", "  - {name: same, model: one}\nchecks:"))
    assert run(path, "episodes.test.num_episodes=15")[1] == 0
    write(
        tmp_path / "st",
        STUDY.replace("checks:", "  - {name: d, set: {evaluation.inner.num_steps: 0}}\nchecks:"),
    )
    assert run(path)[1] == 10
    assert before.items() <= chunk_files(summary.parent.parent).items()


QUERY = ("query_rows", "query_labels")


def test_all_arms_see_the_same_episodes_whatever_the_number_of_queries(make_config, tmp_path):
    make_config("st")
    cross = "cross: {episodes.test.num_queries: [1, 3]}\n"
    path = write(tmp_path / "st", STUDY.partition("checks:")[0] + cross)
    run(path)
    campaign = plan_study(read_study(path), CPU)
    tables = [result.records for result in campaign.results()]
    assert len(tables) == 6
    for table in tables[1:]:
        for column in ("class_ids", "support_rows"):
            assert table.column(column).equals(tables[0].column(column))
    fewer, more = (
        by_label(*(np.array(tables[place].column(name).to_pylist()) for name in QUERY), 3)
        for place in (0, 1)
    )
    assert (fewer == more[..., :1]).all()  # [10, 3, 1] and [10, 3, 3]


def test_arms_of_one_setting_and_more_or_fewer_episodes_share_their_records(make_config, tmp_path):
    make_config("st")
    text = STUDY.partition("arms:")[0] + "cross: {episodes.test.num_episodes: [6, 10]}\n"
    path = write(tmp_path / "st", text)
    _, count = run(path)
    assert count == 10  # not 6 + 10, and chunks of 4 that do not overlap
    few, all_of_them = plan_study(read_study(path), CPU).results()
    assert all_of_them.records.slice(0, 6).equals(few.records)


def test_another_seed_draws_other_episodes_and_is_not_compared(make_config, tmp_path) -> None:
    make_config("st")
    text = STUDY.partition("checks:")[0] + "  - {name: other, set: {episodes.seed: 9}}\n"
    summary, _ = run(write(tmp_path / "st", text))
    assert summary is not None
    assert "other and a: episode 0 has other classes" in summary.read_text("utf-8")


def test_a_model_is_trained_for_each_of_its_seeds_and_judged_on_the_same_episodes(
    make_config, tmp_path
) -> None:
    config = make_config("st")
    text = STUDY.replace("one: {}", "one: {seeds: [0, 1]}")
    for model in ("one", "two"):
        text = text.replace(f", model: {model}", f", model: {model}, checkpoint: last")
    text = text.replace("lr: 0.2}", "lr: 0.2, seeds: [0, 1]}")
    path = write(tmp_path / "st", text)
    summary, count = run(path, "episodes.test.num_episodes=60")
    assert summary is not None
    assert count == 3 * 2 * 60
    runs = {f"tiny-{name}seed{seed}" for name in ("", "two-") for seed in (0, 1)}
    assert {folder.name for folder in config.run_dir.iterdir()} == {"studies", *runs}
    content = json.loads(summary.read_text("utf-8"))
    arms = ["a-seed0", "a-seed1", "b-seed0", "b-seed1", "untrained-seed0", "untrained-seed1"]
    assert list(content["arms"]) == arms
    # the same episodes, other weights
    identities = [arm["identity"] for arm in content["arms"].values()]
    assert len({identity["episodes"] for identity in identities}) == 1
    assert len({identity["weights"] for identity in identities}) == 6
    # over trainings: t(0.975; 1) = 12.7062
    means = [content["arms"][name]["accuracy"]["mean"] for name in arms[:2]]
    found = content["trainings"]["a"]
    assert found["arms"] == {"0": "a-seed0", "1": "a-seed1"}
    assert found["accuracy"]["mean"] == pytest.approx(sum(means) / 2)
    assert found["accuracy"]["num_trainings"] == 2
    assert found["accuracy"]["ci95"] == pytest.approx(12.7062 * abs(means[0] - means[1]) / 2, 1e-4)
    # compared seed by seed
    pairs = [(each["arm"], each["minus"]) for each in content["comparisons"]]
    assert pairs == [(name, f"a-seed{name[-1]}") for name in arms[2:]]
    (verdict,) = content["verdicts"]
    assert verdict["scope"] == "2 trainings of each, paired by seed"
    page = (summary.parent / "report.md").read_text("utf-8")
    assert "(2 trainings of each, paired by seed)" in page
    assert "standard deviation over trainings" in page
    # a training more: what is trained and judged already is not repeated
    write(
        tmp_path / "st",
        path.read_text("utf-8").replace("one: {seeds: [0, 1]", "one: {seeds: [0, 1, 2]"),
    )
    assert run(path, "episodes.test.num_episodes=60")[1] == 2 * 60


def test_a_checkpoint_by_name_is_one_training(make_config, tmp_path) -> None:
    checkpoint = make_config("st").run_dir / "tiny" / "checkpoint_00000001"
    text = STUDY.replace("one: {}", "one: {seeds: [0, 1]}").replace(
        "{name: a, model: one}", f"{{name: a, model: one, checkpoint: {checkpoint}}}"
    )
    assert [arm.chosen.name for arm in read_study(write(tmp_path / "st", text)).arms] == [
        *("a", "b", "untrained-seed0", "untrained-seed1")
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "inner.lr: 0.2",
            "inner.lrr: 0.2",
            "models: two: inner.lrr is unknown; did you mean",
        ),
        ("model.norm: context", "model.norm: nothing", "arms: b: model.norm is 'nothing'"),
        (
            "model.norm: context",
            "model.norm: running",
            "b: .*holds no encoder.conv1.norm.mean, .*, which the model needs",
        ),
        ("model.norm: context", "model.width: 8", "b: .*has the shape .*, the model needs"),
        ("checkpoint: initial", "checkpoint: gone", "untrained: gone.*checkpoint.json"),
        ("config.yaml", "nothing.yaml", "study.yaml: config is .nothing.yaml., and there is no "),
        (
            "checkpoint: initial",
            "set: {episodes.test.num_shots: 9}",
            "untrained: split test: 5 of 5 classes have fewer images than",
        ),
    ],
)
def test_a_mistake_is_named_with_its_arm_before_any_training(
    make_config, tmp_path, old, new, message
) -> None:
    make_config("st")
    path = write(tmp_path / "st", STUDY.replace(old, new))
    with pytest.raises(UserError, match=message):
        run_study(read_study(path), train=pytest.fail, judge=pytest.fail, echo=quiet)


def test_all_mistakes_of_a_study_come_at_once(make_config, tmp_path) -> None:
    make_config("st")
    text = STUDY.replace("inner.lr: 0.2", "inner.lrr: 0.2").replace("norm: context", "nrm: x")
    text = text.replace("minus: b", "minus: z").replace("title: T", "title: [T]")
    path = write(tmp_path / "st", text + "cross: {episodes.test.num_queris: [1, 2]}\n")
    with pytest.raises(UserError) as caught:
        read_study(path, ["outer.lrr=1"])
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7, problems  # each once, for all models and arms
    for text in (
        "title is ['T']",
        "names the arm 'a'",  # it is crossed: the arms are a-num_queris=1, ...
        "names the arm 'z'",
        "command line: outer.lrr is unknown",
        "models: two: inner.lrr is unknown",
        "arms: b: model.nrm is unknown",
        "cross: episodes.test.num_queris is unknown",
    ):
        assert text in problems


def test_a_run_of_other_learning_or_of_another_order_of_images_is_refused(
    make_config, tmp_path
) -> None:
    make_config("st")
    run(write(tmp_path / "st"))
    path = write(tmp_path / "st", STUDY.replace("inner.lr: 0.2", "inner.lr: 0.3"))
    with pytest.raises(UserError, match=r"tiny-two: was started with inner.lr = 0.2, .* 0.3"):
        run(path)
    (folder,) = (tmp_path / "st").rglob("tiny-two")
    tree = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(tree | {"schema_version": 1}))
    with pytest.raises(UserError) as caught:
        run(write(tmp_path / "st"))
    assert caught.value.problems == (
        f"{folder}: was started by an earlier raymaml, whose images stood in another order;"
        " choose another name, or finish it with that version; `raymaml test` judges what it has",
    )


def test_training_that_is_interrupted_ends_the_study(make_config, tmp_path) -> None:
    make_config("st")
    study = read_study(write(tmp_path / "st"))
    judge = pytest.fail
    assert run_study(study, train=lambda *_: False, judge=judge, echo=quiet) is None


@pytest.mark.slow
def test_judging_stops_at_the_first_look_that_is_precise_enough(make_config) -> None:
    overrides = ["episodes.test.num_episodes=1000", "evaluation.baseline_episodes=0"]
    config = make_config("run", "outer.num_steps=1", *overrides)
    assert train_locally(config, quiet)

    def planned(target: float | None, chunk_size: int) -> partial[Campaign]:
        changes = {"target_half_width": target, "chunk_size": chunk_size}
        evaluation = config.evaluation.model_copy(update=changes)
        return partial(plan_test, config.model_copy(update={"evaluation": evaluation}))

    stopped = judge_locally(planned(0.08, 70), config.cluster, quiet)
    stopped_line = headline_of(write_test_report(stopped))
    campaign = planned(0.08, 70)(CPU)
    report = json.loads((campaign.folder / "summary.json").read_text())
    page = (campaign.folder / "report.md").read_text()
    (result,) = campaign.results()
    stopped = len(result.records)
    judge_locally(planned(None, 500), config.cluster, quiet)
    (whole,) = planned(None, 500)(CPU).results()
    accuracies = whole.records.column("accuracy").to_numpy()
    shown = {look: any_look_interval(accuracies[:look]) for look in range(100, 1001, 100)}
    # at a multiple of 100 episodes, the first at which it is known to 8%
    expected = next(look for look in shown if shown[look].half_width <= 0.08)
    assert stopped == expected < 1000
    # what is reported is the interval at any look, wider than that of a size fixed beforehand
    assert report["accuracy"]["ci95"] == shown[expected].half_width <= 0.08
    assert report["accuracy"]["ci95"] > 1.5 * bounded_interval(accuracies[:expected]).half_width
    assert report["accuracy"]["any_look"]["ci95"] == report["accuracy"]["ci95"]
    assert report["stopping"]["stopped_early"]
    text = f"judging stopped early, at look {expected // 100} of at most 10"
    assert text in report["stopping"]["text"]
    assert text in report["headline"]
    assert f"+- {100 * shown[expected].half_width:.2f}% accuracy" in stopped_line
    assert text in stopped_line
    assert text in page
    # chunks of 70 reach up to 69 episodes further, and no more was judged
    again = planned(0.08, 500)(CPU)
    assert again.missing() == []
    assert len(again.results()[0].records) == expected


def test_two_models_cannot_be_one_run_unless_they_learn_alike(make_config, tmp_path) -> None:
    make_config("st")
    one = STUDY.replace("two: {inner.lr: 0.2}", "two: {name: tiny}")
    assert len(read_study(write(tmp_path / "st", one)).trainings) == 2
    other = STUDY.replace("two: {inner.lr: 0.2}", "two: {name: tiny, inner.lr: 0.2}")
    with pytest.raises(UserError, match="models: two: is the run tiny, as is a model that learns"):
        read_study(write(tmp_path / "st", other))


def test_studies_that_share_records_are_judged_one_at_a_time(make_config, tmp_path) -> None:
    config = make_config("st")
    records = config.run_dir / "studies" / "tiny" / "records"
    records.mkdir(parents=True)
    with FileLock(records / ".lock"), pytest.raises(UserError, match="another process is judging"):
        run(write(tmp_path / "st"))
    assert run(write(tmp_path / "st"))[1] == 3 * 10


def test_of_very_many_mistakes_the_first_are_reported(make_config, tmp_path) -> None:
    make_config("st")
    frozen = f"two: {{inner.frozen: {[0] * 2000}}}"
    with pytest.raises(UserError) as caught:
        read_study(write(tmp_path / "st", STUDY.replace("two: {inner.lr: 0.2}", frozen)))
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1].endswith("config.yaml: and 1950 mistakes more")


def test_cosine_similarity_and_the_ensemble_are_arms(make_config, tmp_path) -> None:
    make_config("st", "outer.validate_every=1")
    arms = """\
arms:
  - {name: a, model: one}
  - {name: nil, model: one, set: {evaluation.head: cosine}}
  - {name: b, model: two, checkpoint: ensemble}
"""
    text = STUDY[: STUDY.index("arms:")] + arms
    with pytest.raises(UserError, match=r"arms: b: checkpoint is ensemble but outer\.keep_best"):
        read_study(write(tmp_path / "st", text))
    path = write(tmp_path / "st", text.replace("{inner.lr: 0.2}", "{outer.keep_best: 2}"))
    summary, count = run(path)
    assert summary is not None
    assert count == 3 * 10
    protocols = [arm["protocol"] for arm in json.loads(summary.read_text())["arms"].values()]
    assert [" | head cosine" in each for each in protocols] == [False, True, False]
    assert [" | ensemble of 2" in each for each in protocols] == [False, False, True]
    assert run(path) == (summary, 0)
