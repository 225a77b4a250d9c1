"""Sweeps in this process: trials, what is remembered through a kill, report and export."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import quiet

from raymaml.common.errors import StorageError, UserError
from raymaml.config.load import load_config
from raymaml.evaluation.run_test import plan_test
from raymaml.experiments.journal import STATE_FILE, Decide, Journal
from raymaml.experiments.sweep import (
    Propose,
    Runner,
    Sweep,
    Trial,
    draw_values,
    read_sweep,
    run_in_order,
    run_sweep,
)
from raymaml.storage.files import write_text
from raymaml.training.checkpoint import find_checkpoint, read_card, weights_of
from raymaml.training.state import Validation
from raymaml.training.worker import train_locally

SPACE = """\
name: s
title: A sweep
config: config.yaml
space:
  outer.lr: {log_uniform: [1e-3, 1e-1]}
  inner.lr: {uniform: [0.05, 0.3]}
num_trials: 3
"""
ALL = f"{SPACE}scheduler: none\n"


class Killed(BaseException):
    """No handler expects it."""


@pytest.fixture
def make_sweep(make_config, tmp_path: Path) -> Callable[..., Sweep]:
    def make(text: str = ALL, place: str = "run", *overrides: str) -> Sweep:
        make_config(place)
        path = tmp_path / place / "s.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, overrides)

    return make


def always(_trial: int, _step: int, _accuracy: float) -> bool:
    return True


def run(
    sweep: Sweep,
    decide: Decide = always,
    propose: Propose | None = None,
    runner: Runner = run_in_order,
) -> dict[str, Any]:
    if propose is None:
        propose = lambda trial, _journal: draw_values(sweep.settings, trial)  # noqa: E731
    path = run_sweep(sweep, runner=runner, decide=decide, propose=propose, echo=quiet)
    return json.loads(path.read_text("utf-8"))


def dying(sweep: Sweep, after: int) -> Decide:
    """Let all go on, and die at the report that comes after ``after`` new ones."""
    path = sweep.folder / STATE_FILE
    known = len(json.loads(path.read_text("utf-8"))["reports"]) if path.exists() else 0
    calls = itertools.count()

    def decide(_trial: int, _step: int, _accuracy: float) -> bool:
        if next(calls) >= known + after:
            raise Killed
        return True

    return decide


def run_through_kills(
    sweep: Sweep, after: int, propose: Propose | None = None
) -> tuple[int, dict[str, Any]]:
    for kills in range(30):
        try:
            return kills, run(sweep, dying(sweep, after), propose)
        except Killed:
            pass
    raise AssertionError("it does not come forward")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return weights_of(find_checkpoint(folder, "last"), torch.device("cpu"))


def same_bits(one: Path, other: Path) -> bool:
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def in_brief(content: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The trials in the order of their numbers."""
    keys = ("trial", "status", "steps", "best", "values", "problem")
    trials = sorted(content["trials"], key=lambda trial: trial["trial"])
    return [tuple(trial[key] for key in keys) for trial in trials]


@pytest.mark.slow
def test_every_trial_ends_in_the_bits_of_a_training_run_and_is_not_run_again(make_sweep, tmp_path):
    sweep = make_sweep()
    content = run(sweep)
    assert [trial["status"] for trial in content["trials"]] == ["done"] * 3
    for trial in sweep.checked:
        folder = trial.config.run_folder
        assert folder == sweep.folder / f"trial-{trial.number:05d}"
        config = load_config(folder / "config.yaml", [f"run_dir={tmp_path}/alone"])
        assert config.outer.lr == trial.values["outer.lr"]
        assert train_locally(config, quiet)
        assert same_bits(folder, config.run_folder)
    bests = [read_card(find_checkpoint(t.config.run_folder, "last")).best for t in sweep.checked]
    assert content["best"]["accuracy"] == max(best.accuracy for best in bests)

    def no_runner(_sweep: Sweep, _trials: Iterator[Trial], _journal: Journal) -> None:
        pytest.fail("nothing is left to do")

    assert run(sweep, runner=no_runner) == content
    after = run(make_sweep(ALL.replace("num_trials: 3", "num_trials: 4")))
    assert in_brief(after)[:3] == in_brief(content)  # more trials leave the others as they are
    assert in_brief(after)[3][1] == "done"


@pytest.mark.slow
def test_a_sweep_goes_on_through_kills(make_sweep):
    whole, killed = make_sweep(ALL, "whole"), make_sweep(ALL, "killed")
    expected = run(whole)
    kills, found = run_through_kills(killed, after=2)
    assert kills == 4  # 3 trials of 3 validations: 9 reports, 2 a life
    assert in_brief(found) == in_brief(expected)
    for one, other in zip(killed.checked, whole.checked, strict=True):
        assert same_bits(one.config.run_folder, other.config.run_folder)


def test_a_stopped_trial_stays_stopped_and_the_report_lists_trials_by_accuracy(make_sweep):
    sweep = make_sweep()

    def decide(trial: int, step: int, _accuracy: float) -> bool:
        return trial != 1 or step < 3

    content = run(sweep, decide)
    found = [(status, steps) for _, status, steps, *_ in in_brief(content)]
    assert found == [("done", 6), ("stopped", 3), ("done", 6)]
    accuracies = [trial["best"]["accuracy"] for trial in content["trials"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert content["best"] == content["trials"][0]["best"]
    lines = (sweep.folder / "sweep.md").read_text("utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][-3:]
    assert [row[:3] for row in rows] == [
        [f"| {trial['trial']}", trial["status"], str(trial["steps"])] for trial in content["trials"]
    ]
    assert "outer.lr" in (sweep.folder / "sweep.html").read_text("utf-8")
    again = run(sweep, always)  # another scheduler now: the decisions stay
    assert in_brief(again) == in_brief(content)


def test_a_trial_that_fails_is_reported_and_the_others_go_on(make_sweep):
    text = ALL.replace("{uniform: [0.05, 0.3]}", "{choice: [0.1, 1e30]}") + "seed: 2\n"
    sweep = make_sweep(text.replace("num_trials: 3", "num_trials: 4"))
    rates = [trial.values["inner.lr"] for trial in sweep.checked]
    assert set(rates) == {0.1, 1e30}
    content = run(sweep)
    for (_, status, *_, problem), rate in zip(in_brief(content), rates, strict=True):
        assert status == ("done" if rate == 0.1 else "failed")
        assert ("not finite" in (problem or "")) == (rate != 0.1)
    page = (sweep.folder / "sweep.md").read_text("utf-8")
    assert "## Failed" in page
    assert in_brief(run(sweep)) == in_brief(content)  # tried again, with the same end


def test_a_full_disk_ends_the_sweep_and_is_no_failing_of_a_trial(make_sweep):
    sweep = make_sweep(ALL, "run", 'model={encoder: "helpers_faults:Full", norm: none}')
    with pytest.raises(StorageError, match=r"scratch: cannot be read or written .* make room"):
        run(sweep)
    state = json.loads((sweep.folder / STATE_FILE).read_text("utf-8"))
    assert state["reports"] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_the_best_checkpoint_can_be_judged_and_an_older_export_is_kept(make_sweep, place, request):
    there = [] if place == "disk" else [f"run_dir={request.getfixturevalue('s3')}/runs"]
    sweep = make_sweep(ALL.replace("num_trials: 3", "num_trials: 1"), "run", *there)
    run(sweep)
    config = load_config(sweep.folder / "best" / "config.yaml")
    assert plan_test(config, torch.device("cpu")).arms[0].checkpoints != ()
    write_text(sweep.folder / "best" / "test" / "of-the-user", "")
    found = run(make_sweep(ALL.replace("num_trials: 3", "num_trials: 6"), "run", *there))
    best = found["best"]
    assert best["trial"] != 0  # else this test tests nothing
    card = read_card(find_checkpoint(sweep.folder / "best", "best"))
    assert card.best is not None
    assert (card.step, card.best.accuracy) == (best["step"], best["accuracy"])
    (kept,) = sweep.folder.glob("best-was-trial-00000-at-*/test/of-the-user")
    assert not (sweep.folder / "best" / "test" / "of-the-user").exists()
    assert load_config(kept.parent.parent / "config.yaml") == config


@pytest.mark.slow
def test_an_export_that_a_kill_left_half_at_a_uri_is_made_again(make_sweep, s3):
    sweep = make_sweep(ALL.replace("num_trials: 3", "num_trials: 1"), "run", f"run_dir={s3}/runs")
    run(sweep)
    for name in ("from.json", "config.yaml"):  # from.json is written last
        (sweep.folder / "best" / name).unlink()
    run(sweep)
    assert load_config(sweep.folder / "best" / "config.yaml").name == "best"
    assert (sweep.folder / "best-was-incomplete").exists()


@pytest.mark.parametrize(
    ("low", "change", "says"),
    [
        ("0.05", "episodes.val.num_shots=2", "episodes.val.num_shots = 1, the sweep now says 2"),
        ("0.05", "inner.head_lr=0.3", "inner.head_lr = None, the sweep now says 0.3"),
        ("0.06", "seed=3", "sweep.space = "),
    ],
)
def test_a_sweep_goes_on_by_its_settings_alone(make_sweep, tmp_path, low, change, says):
    Journal(tmp_path, make_sweep().identity(), always).begin(0, {})
    text = ALL.replace("0.05", low)
    with pytest.raises(UserError) as caught:
        Journal(tmp_path, make_sweep(text, "run", change).identity(), always)
    assert f"{tmp_path}: was started with {says}" in str(caught.value)
    assert "give the old value" in str(caught.value)


def test_all_mistakes_of_drawn_configs_are_reported_before_anything_starts(make_sweep):
    text = """\
name: s
title: T
config: config.yaml
space:
  outer.rate: {choice: [1]}
  model.norm: {grid: [context, ghost]}
scheduler: {kind: asha, grace_steps: 4}
"""
    with pytest.raises(UserError) as caught:
        make_sweep(text)
    assert len(caught.value.problems) == 3
    for says in (
        "s.yaml: space: outer.rate is unknown",
        "model.norm is 'ghost'",
        "scheduler.grace_steps is 4; it must be a multiple of outer.validate_every, 3",
    ):
        assert says in str(caught.value)
    with pytest.raises(UserError, match=r"is 6; it must be below outer.num_steps, 6"):
        make_sweep(f"{SPACE}scheduler: {{kind: asha, grace_steps: 6}}\n")


def test_a_model_that_cannot_be_built_is_reported_before_anything_starts(make_sweep):
    text = ALL.replace("inner.lr: {uniform: [0.05, 0.3]}", "inner.frozen: {choice: [[nothing]]}")
    sweep = make_sweep(text)
    with pytest.raises(UserError, match=r"trial-00002: inner\.frozen: 'nothing' matches nothing"):
        run(sweep)
    assert not (sweep.folder / STATE_FILE).exists()


def validation(step: int, accuracy: float) -> Validation:
    return Validation(step=step, accuracy=accuracy, ci95=float("inf"), loss=1.0)


def test_the_journal_gives_a_known_report_the_known_answer(tmp_path):
    seen: list[tuple[int, int, float]] = []
    lines: list[str] = []

    def decide(*report: Any) -> bool:
        seen.append(report)
        return len(seen) < 2

    journal = Journal(tmp_path, {"seed": 0}, decide, lines.append)
    for _ in range(2):
        assert journal.report(0, Validation(step=3, accuracy=0.5, ci95=0.25, loss=1.0))
        assert not journal.report(1, validation(3, 0.25))
    assert len(seen) == 2
    journal.fail(2, "no luck")
    assert lines == [
        "trial 0  step 3  validation accuracy 50.00 +- 25.00%",
        "trial 1  step 3  validation accuracy 25.00%; the trial ends",
        "trial 2  failed: no luck",
    ]

    again = Journal(tmp_path, {"seed": 0}, decide)
    assert seen[2:] == seen[:2]  # the scheduler sees all in the old order
    assert again.reports == journal.reports
    assert not again.report(1, validation(3, 0.25))
    assert [again.status(trial, 9) for trial in range(3)] == ["begun", "stopped", "begun"]


def test_a_torn_or_older_state_is_a_message(tmp_path):
    (tmp_path / STATE_FILE).write_text('{"schema_version": 2, "rep')
    with pytest.raises(UserError, match=r"state\.json: is damaged .* restore it from a copy"):
        Journal(tmp_path, {}, always)
    (tmp_path / STATE_FILE).write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match=r"has schema_version 1, this raymaml reads 2"):
        Journal(tmp_path, {}, always)


def test_a_mistake_of_every_trial_is_reported_for_some(make_sweep):
    text = ALL.replace("num_trials: 3", "num_trials: 500").replace("[0.05, 0.3]", "[-2, -1]")
    with pytest.raises(UserError) as caught:
        make_sweep(text)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].endswith("there may be more, in trials after 19")


def test_a_journal_that_may_not_write_any_more_says_so(tmp_path):
    def lost() -> None:
        raise UserError("another process has taken over")

    journal = Journal(tmp_path, {}, always, require=lost)
    with pytest.raises(UserError, match="taken over"):
        journal.report(0, validation(3, 0.5))
    assert not (tmp_path / STATE_FILE).exists()


OPTUNA = (
    ALL.replace("num_trials: 3", "num_trials: 12") + "search: optuna\nset: {outer.num_steps: 3}\n"
)


@pytest.mark.slow
def test_a_search_by_optuna_ends_in_the_same_trials_through_kills(make_sweep):
    """The first 10 proposals are at random; the others know the trials before them."""
    pytest.importorskip("optuna")
    from raymaml.cluster.search import proposals

    whole, killed = make_sweep(OPTUNA, "whole"), make_sweep(OPTUNA, "killed")
    expected = run(whole, propose=proposals(whole.settings))
    kills, found = run_through_kills(killed, 5, proposals(killed.settings))
    assert kills == 4  # 12 trials of 2 validations: 24 reports, 5 a life
    assert in_brief(found) == in_brief(expected)


def test_every_edge_of_a_search_is_checked_before_anything_starts(make_sweep):
    text = OPTUNA.replace("[0.05, 0.3]", "[-2, 0.3]").replace(
        "{log_uniform: [1e-3, 1e-1]}", "{choice: [0.01, -3]}"
    )
    with pytest.raises(UserError) as caught:
        make_sweep(text)
    assert "inner.lr is -2" in str(caught.value)
    assert "outer.lr is -3" in str(caught.value)
