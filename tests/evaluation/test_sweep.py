"""Sweeps in this process: trials, what is remembered through a kill, report and export."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymaml.common.errors import StorageError, UserError
from raymaml.config.load import load_config
from raymaml.config.sweep import Dimension
from raymaml.evaluation.legs import local_runner
from raymaml.evaluation.parallel import accuracy_range, axis_ticks, plot_parallel
from raymaml.evaluation.plan import plan_test
from raymaml.evaluation.referee import STATE_FILE, Decide, Referee, Report, always
from raymaml.evaluation.sweep import Sweep, read_sweep, run_sweep
from raymaml.evaluation.sweep_progress import SweepProgress
from raymaml.evaluation.sweep_report import text_table
from raymaml.evaluation.sweep_table import TrialRow, ranked
from raymaml.storage.files import write_text
from raymaml.training.checkpoint import copy_for_going_on, find_checkpoint, read_card
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
POPULATION = (
    SPACE.replace("num_trials: 3", "num_trials: 4")
    + "set: {outer.num_steps: 9}\nscheduler: {kind: pbt, perturb_every: 3, quantile: 0.5}\n"
)


class Killed(BaseException):
    """No handler expects it."""


def quiet(_line: str) -> None:
    pass


@pytest.fixture
def make_sweep(make_config, tmp_path: Path) -> Callable[..., Sweep]:
    def make(text: str = ALL, place: str = "run", *overrides: str) -> Sweep:
        make_config(place)
        path = tmp_path / place / "s.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, overrides)

    return make


def run(sweep: Sweep, decide: Callable[[Sweep], Decide] = lambda _: always) -> dict[str, Any]:
    path = run_sweep(sweep, runner=local_runner, decide=decide, echo=quiet)
    return json.loads(path.read_text("utf-8"))


def dying(after: int) -> Callable[[Sweep], Decide]:
    """Let all go on, and die at the report that comes after so many new ones."""

    def decisions(sweep: Sweep) -> Decide:
        path = sweep.folder / STATE_FILE
        known = len(json.loads(path.read_text("utf-8"))["reports"]) if path.exists() else 0
        calls = itertools.count()

        def decide(_trial: int, _step: int, _accuracy: float) -> bool:
            if next(calls) >= known + after:
                raise Killed
            return True

        return decide

    return decisions


def run_through_kills(sweep: Sweep, after: int) -> tuple[int, dict[str, Any]]:
    for kills in range(30):
        try:
            return kills, run(sweep, dying(after))
        except Killed:
            pass
    raise AssertionError("it does not come forward")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(find_checkpoint(folder, "last") / "params.pt", weights_only=True)


def same_bits(one: Path, other: Path) -> bool:
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def in_brief(content: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (t["trial"], t["status"], t["steps"], t["best"], t["values"]) for t in content["trials"]
    ]


@pytest.mark.slow
def test_every_trial_is_a_training_run_and_ends_in_its_bits(make_sweep, tmp_path):
    sweep = make_sweep()
    content = run(sweep)
    assert [trial["status"] for trial in content["trials"]] == ["done"] * 3
    for trial in sweep.trials:
        folder = trial.config.run_folder
        assert folder == sweep.folder / f"trial-{trial.number:05d}"
        config = load_config(folder / "config.yaml", [f"run_dir={tmp_path}/alone"])
        assert config.outer.lr == trial.values["outer.lr"]
        assert train_locally(config, quiet)
        assert same_bits(folder, config.run_folder)
    bests = [read_card(find_checkpoint(t.config.run_folder, "last")).best for t in sweep.trials]
    assert content["best"]["accuracy"] == max(best.accuracy for best in bests)


@pytest.mark.slow
def test_a_sweep_goes_on_through_kills(make_sweep):
    whole, killed = make_sweep(ALL, "whole"), make_sweep(ALL, "killed")
    expected = run(whole)
    kills, found = run_through_kills(killed, after=2)
    assert kills == 4  # 3 trials of 3 validations: 9 reports, 2 a life
    assert in_brief(found) == in_brief(expected)
    for one, other in zip(killed.trials, whole.trials, strict=True):
        assert same_bits(one.config.run_folder, other.config.run_folder)


@pytest.mark.slow
def test_what_is_over_is_not_run_again_and_more_trials_leave_the_rest(make_sweep):
    sweep = make_sweep()
    before = run(sweep)

    def no_runner(_sweep: Sweep) -> Any:
        pytest.fail("nothing is left to do")

    run_sweep(sweep, runner=no_runner, decide=lambda _: always, echo=quiet)
    after = run(make_sweep(ALL.replace("num_trials: 3", "num_trials: 4")))
    assert in_brief(after)[:3] == in_brief(before)
    assert after["trials"][3]["status"] == "done"


def test_a_trial_that_is_told_to_end_stays_ended(make_sweep):
    sweep = make_sweep()

    def decide(trial: int, step: int, _accuracy: float) -> bool:
        return trial != 1 or step < 3

    content = run(sweep, lambda _: decide)
    assert [(t["status"], t["steps"]) for t in content["trials"]] == [
        ("done", 6),
        ("stopped", 3),
        ("done", 6),
    ]
    again = run(sweep, lambda _: always)  # another mind now: what was decided stays
    assert in_brief(again) == in_brief(content)


def test_a_trial_that_fails_is_told_so_and_the_others_go_on(make_sweep):
    text = ALL.replace("{uniform: [0.05, 0.3]}", "{choice: [0.1, 1e30]}") + "seed: 2\n"
    sweep = make_sweep(text.replace("num_trials: 3", "num_trials: 4"))
    rates = [trial.values["inner.lr"] for trial in sweep.trials]
    assert set(rates) == {0.1, 1e30}
    content = run(sweep)
    for trial, rate in zip(content["trials"], rates, strict=True):
        assert trial["status"] == ("done" if rate == 0.1 else "failed")
        assert ("not finite" in (trial["problem"] or "")) == (rate != 0.1)
    page = (sweep.folder / "sweep.md").read_text("utf-8")
    assert "## Failed" in page
    assert in_brief(run(sweep)) == in_brief(content)  # tried again, with the same end


def test_a_full_disk_ends_the_sweep_and_is_no_failing_of_a_trial(make_sweep):
    sweep = make_sweep(ALL, "run", 'model={encoder: "helpers_faults:Full", norm: none}')
    with pytest.raises(StorageError, match=r"scratch: cannot be read or written .* make room"):
        run(sweep)
    assert not (sweep.folder / STATE_FILE).exists()


@pytest.mark.slow
def test_a_population_ends_in_the_same_lineage_through_kills(make_sweep):
    whole, killed = make_sweep(POPULATION, "whole"), make_sweep(POPULATION, "killed")
    expected = run(whole)
    assert len(expected["lineage"]) == 2 * 2  # half of 4 trials before steps 3 and 6
    kills, found = run_through_kills(killed, after=3)
    assert kills >= 4
    assert found["lineage"] == expected["lineage"]
    assert in_brief(found) == in_brief(expected)
    runs = [exploit["run"] for exploit in expected["lineage"]]
    assert all(same_bits(killed.folder / name, whole.folder / name) for name in runs)
    assert json.loads((killed.folder / "lineage.json").read_text("utf-8")) == expected["lineage"]


@pytest.mark.slow
def test_a_trial_that_takes_over_learns_as_training_from_that_checkpoint(make_sweep, tmp_path):
    sweep = make_sweep(POPULATION)
    exploit = next(each for each in run(sweep)["lineage"] if each["step"] == 3)
    taken_over = sweep.folder / exploit["run"]
    last = read_card(find_checkpoint(taken_over, "last")).step  # 9, or 6 if it was replaced again
    lone = [f"run_dir={tmp_path}/lone"]
    donor = load_config(
        sweep.folder / exploit["donor_run"] / "config.yaml", [*lone, "outer.num_steps=3"]
    )
    config = load_config(taken_over / "config.yaml", [*lone, f"outer.num_steps={last}"])
    assert config.outer.lr == exploit["values"]["outer.lr"] != donor.outer.lr
    assert train_locally(donor, quiet)
    copy_for_going_on(donor.run_folder, config.run_folder, 3)
    lineage = (taken_over / "lineage.json").read_bytes()
    (config.run_folder / "lineage.json").write_bytes(lineage)

    assert train_locally(config, quiet)

    assert last > 3
    assert same_bits(config.run_folder, taken_over)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_the_best_checkpoint_can_be_judged_and_an_older_export_is_kept(make_sweep, place, request):
    there = [] if place == "disk" else [f"run_dir={request.getfixturevalue('s3')}/runs"]
    sweep = make_sweep(ALL.replace("num_trials: 3", "num_trials: 1"), "run", *there)
    run(sweep)
    config = load_config(sweep.folder / "best" / "config.yaml")
    assert plan_test(config, torch.device("cpu")).arms[0].checkpoint is not None
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
def test_an_export_that_a_kill_left_half_at_a_uri_is_made_anew(make_sweep, s3):
    sweep = make_sweep(ALL.replace("num_trials: 3", "num_trials: 1"), "run", f"run_dir={s3}/runs")
    run(sweep)
    for name in ("from.json", "config.yaml"):  # from.json is written last
        (sweep.folder / "best" / name).unlink()
    run(sweep)
    assert load_config(sweep.folder / "best" / "config.yaml").name == "best"
    assert (sweep.folder / "best-was-incomplete").exists()


def test_another_space_is_refused(make_sweep):
    run(make_sweep())
    with pytest.raises(UserError, match=r"was started with space = .*0\.05.* now says .*0\.06"):
        run(make_sweep(ALL.replace("0.05", "0.06")))


def test_an_export_takes_the_lineage_along(make_sweep):
    sweep = make_sweep(ALL.replace("num_trials: 3", "num_trials: 1"))
    best = run(sweep)["best"]
    (sweep.folder / best["run"] / "lineage.json").write_text("of a population")
    shutil.rmtree(sweep.folder / "best")
    run(sweep)
    assert (sweep.folder / "best" / "lineage.json").read_text() == "of a population"


def begun(sweep: Sweep, folder: Path) -> Path:
    referee = Referee(folder, sweep.decides_by(), always)
    referee.report(0, "trial-00000", Validation(step=3, accuracy=0.5, ci95=0.1, loss=1.0))
    return folder / STATE_FILE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("evaluation.inner={num_steps: 0}", "evaluation.inner.num_steps = 2, the sweep now says 0"),
        ("episodes.val.num_shots=2", "episodes.val.num_shots = 1, the sweep now says 2"),
        ("inner.head_lr=0.3", "config.inner.head_lr = None, the sweep now says 0.3"),
    ],
)
def test_a_sweep_goes_on_by_its_validation_alone(make_sweep, tmp_path, change, says):
    begun(make_sweep(), tmp_path)
    other = make_sweep(ALL, "run", change)
    with pytest.raises(UserError, match="was started with") as caught:
        Referee(tmp_path, other.decides_by(), always)
    assert f"{tmp_path}: was started with {says}; give the old value" in str(caught.value)


def test_a_sweep_that_does_not_know_a_key_goes_on_with_its_default(make_sweep, tmp_path):
    sweep = make_sweep()
    path = begun(sweep, tmp_path)
    state = json.loads(path.read_text())
    for section, key in (("cluster", "precision"), ("inner", "head_lr"), ("model", "norm")):
        del state["identity"][f"config.{section}"][key]
    del state["identity"]["validation"]
    path.write_text(json.dumps(state))
    assert len(Referee(tmp_path, sweep.decides_by(), always).reports) == 1
    state["identity"]["config.outer"]["lr"] = 0.5
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"config\.outer\.lr = 0\.5, the sweep now says 0\.001"):
        Referee(tmp_path, sweep.decides_by(), always)


def test_all_mistakes_of_drawn_configs_are_told_before_anything_starts(make_sweep):
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
    rate, norm, grace = sorted(caught.value.problems, key=lambda each: each[-5:], reverse=True)
    found = "\n".join((rate, norm, grace))
    assert "s.yaml: space: outer.rate is unknown" in found
    assert "model.norm is 'ghost'" in found
    assert "scheduler.grace_steps is 4; it must be a multiple of outer.validate_every, 3" in found


@pytest.mark.parametrize(
    "scheduler", ["{kind: asha, grace_steps: 6}", "{kind: pbt, perturb_every: 6, quantile: 0.5}"]
)
def test_a_comparison_at_the_end_is_none(make_sweep, scheduler):
    with pytest.raises(UserError, match=r"is 6; it must be below outer.num_steps, 6"):
        make_sweep(f"{SPACE}scheduler: {scheduler}\n")


def test_a_model_that_cannot_be_built_is_told_before_anything_starts(make_sweep):
    text = ALL.replace("inner.lr: {uniform: [0.05, 0.3]}", "inner.frozen: {choice: [[nothing]]}")
    sweep = make_sweep(text)
    with pytest.raises(UserError, match=r"trial-00002: inner\.frozen: 'nothing' matches nothing"):
        run(sweep)
    assert not (sweep.folder / STATE_FILE).exists()


def validation(step: int, accuracy: float) -> Validation:
    return Validation(step=step, accuracy=accuracy, ci95=float("inf"), loss=1.0)


def test_the_referee_gives_a_known_report_the_known_answer(tmp_path):
    seen: list[tuple[int, int, float]] = []

    def decide(*report: Any) -> bool:
        seen.append(report)
        return len(seen) < 2

    referee = Referee(tmp_path, {"seed": 0}, decide)
    assert referee.report(0, "trial-00000", validation(3, 0.5))
    assert not referee.report(1, "trial-00001", validation(3, 0.25))
    assert referee.report(0, "trial-00000", validation(3, 0.5))
    assert len(seen) == 2

    again = Referee(tmp_path, {"seed": 0}, decide)
    assert seen[2:] == seen[:2]  # the scheduler sees all in the old order
    assert again.reports == referee.reports
    assert not again.report(1, "trial-00001", validation(3, 0.25))
    assert [again.status(trial, 9) for trial in range(3)] == ["running", "stopped", "waiting"]


def test_a_torn_state_is_a_message(tmp_path):
    (tmp_path / STATE_FILE).write_text('{"schema_version": 1, "rep')
    with pytest.raises(UserError, match=r"state\.json: is damaged .* restore it from a copy"):
        Referee(tmp_path, {}, always)
    (tmp_path / STATE_FILE).write_text('{"schema_version": 7}')
    with pytest.raises(UserError, match=r"has schema_version 7, this raymaml reads 1"):
        Referee(tmp_path, {}, always)


def test_a_state_that_names_a_run_elsewhere_is_a_message(tmp_path):
    report = {"trial": 0, "step": 3, "accuracy": 0.5, "ci95": 0.1, "goes_on": True}
    state = {"schema_version": 1, "identity": {}, "failures": {}}
    for run_name, is_good in (("trial-00000", True), ("../elsewhere/trial-00000", False)):
        reports = [report | {"run": run_name}]
        (tmp_path / STATE_FILE).write_text(json.dumps(state | {"reports": reports}))
        if is_good:
            assert Referee(tmp_path, {}, always).reports[0].run == run_name
        else:
            with pytest.raises(UserError, match=r"state\.json: is damaged"):
                Referee(tmp_path, {}, always)


@pytest.mark.parametrize("count", [10_001, 2**62])
def test_more_trials_than_anybody_means_are_a_message(make_sweep, count):
    for text in (ALL, POPULATION.replace("num_trials: 4", "num_trials: 3")):
        with pytest.raises(UserError, match=r"these are more than 10,000 trials; give fewer"):
            make_sweep(text.replace("num_trials: 3", f"num_trials: {count}"))


def test_a_mistake_of_every_trial_is_told_for_some(make_sweep):
    text = ALL.replace("num_trials: 3", "num_trials: 500").replace("[0.05, 0.3]", "[-2, -1]")
    with pytest.raises(UserError) as caught:
        make_sweep(text)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].endswith("there may be more, in trials after 19")


def row(trial: int, accuracy: float | None, **more: Any) -> TrialRow:
    best = None
    if accuracy is not None:
        best = Report(trial=trial, run="r", step=3, accuracy=accuracy, ci95=0.01, goes_on=True)
    values = {"outer.lr": 0.01, "model.norm": "context"}
    known = {"run": "r", "status": "done", "steps": 3, "num_steps": 6, "problem": None}
    return TrialRow(trial=trial, best=best, values=values, **(known | more))


def test_the_table_is_by_accuracy(tmp_path):
    rows = [row(0, 0.5), row(1, None, status="failed"), row(2, 0.75, status="stopped")]
    assert [each.trial for each in ranked(rows)] == [2, 0, 1]
    assert text_table(rows) == [
        "trial  status   steps  best            outer.lr  model.norm",
        "2      stopped  3/6    75.00 +- 1.00%  0.01      context",
        "0      done     3/6    50.00 +- 1.00%  0.01      context",
        "1      failed   3/6    -               0.01      context",
    ]


def test_the_plot_is_a_function_of_the_rows(tmp_path):
    space = {
        "outer.lr": Dimension(log_uniform=(1e-3, 1e-1)),
        "model.norm": Dimension(choice=("context", "instance")),
    }
    rows = [row(0, 0.5), row(1, 0.75), row(2, None)]
    plot_parallel(tmp_path / "a.png", rows, space)
    plot_parallel(tmp_path / "b.png", rows, space)
    plot_parallel(tmp_path / "c.png", [row(0, 0.5), row(1, 0.7)], space)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert accuracy_range([0.512, 0.747]) == (0.51, 0.75)
    assert accuracy_range([0.5]) == (0.5, 0.51)
    assert axis_ticks(space["outer.lr"]) == [(0, "0.001"), (0.5, "0.01"), (1, "0.1")]
    close = axis_ticks(Dimension(log_uniform=(0.09, 3)))
    assert [text for _, text in close] == ["0.09", "1", "3"]  # 0.1 would be written over 0.09
    linear = axis_ticks(Dimension(uniform=(0, 1)))
    assert [text for _, text in linear] == ["0", "0.25", "0.5", "0.75", "1"]
    assert axis_ticks(Dimension(integer=(1, 3))) == [(0, "1"), (0.5, "2"), (1, "3")]


def test_lines_tell_what_was_decided(make_sweep):
    sweep = make_sweep()
    referee = Referee(sweep.folder, {}, lambda trial, _step, _accuracy: trial == 0)
    lines: list[str] = []
    with SweepProgress(sweep, referee, [], lines.append) as progress:
        referee.watch = progress.show
        referee.report(0, "trial-00000", Validation(step=3, accuracy=0.5, ci95=0.25, loss=1))
        referee.report(1, "trial-00001", Validation(step=3, accuracy=0.25, ci95=0.25, loss=1))
        referee.report(0, "trial-00000", Validation(step=6, accuracy=0.75, ci95=0.25, loss=1))
        referee.fail(2, "no luck")
    assert lines == [
        "trial 0  step 3/6  validation accuracy 50.00 +- 25.00%  goes on  (1 running, 2 waiting)",
        "trial 1  step 3/6  validation accuracy 25.00 +- 25.00%  stopped"
        "  (1 running, 1 waiting, 1 stopped)",
        "trial 0  step 6/6  validation accuracy 75.00 +- 25.00%  done"
        "  (1 waiting, 1 done, 1 stopped)",
        "trial 2  failed: no luck  (1 done, 1 stopped, 1 failed)",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_table(make_sweep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    sweep = make_sweep()
    referee = Referee(sweep.folder, {}, always)
    with SweepProgress(sweep, referee, [], pytest.fail) as progress:
        referee.watch = progress.show
        referee.report(1, "trial-00001", validation(3, 0.5))
    shown = terminal.getvalue()
    assert "1 running, 2 waiting" in shown
    assert "50.00%" in shown
    assert "outer.lr" in shown


def test_a_referee_that_may_not_write_any_more_says_nothing(tmp_path):
    def lost() -> None:
        raise UserError("another process has taken over")

    referee = Referee(tmp_path, {}, always, lost)
    with pytest.raises(UserError, match="taken over"):
        referee.report(0, "trial-00000", validation(3, 0.5))
    assert not (tmp_path / STATE_FILE).exists()
