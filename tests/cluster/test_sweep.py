"""Sweeps on Ray Tune: decisions, kills, and trials with workers of their own."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_cluster import attempts, pids
from helpers_faults import assert_same_bits, quiet
from machinery import wait_until

from raymaml.cluster.search import asha_decisions, decisions, proposals
from raymaml.cluster.sweep import run_on_tune
from raymaml.common.errors import UserError
from raymaml.config.sweep import SweepConfig
from raymaml.experiments.journal import STATE_FILE, Journal
from raymaml.experiments.sweep import (
    Runner,
    Sweep,
    draw_values,
    read_sweep,
    run_in_order,
    run_sweep,
)
from raymaml.training.state import Validation
from raymaml.training.worker import train_locally

SPACE = """\
name: s
title: A sweep
config: config.yaml
space:
  outer.lr: {log_uniform: [1e-3, 1e-1]}
  model.norm: {grid: [transductive, context]}
"""
ASHA = f"{SPACE}num_trials: 5\nmax_concurrent_trials: 1\nset: {{outer.num_steps: 12}}\n"
OPTUNA = ASHA.replace("grid:", "choice:") + "search: optuna\n"


FULL = 'model={encoder: "helpers_faults:Full", norm: none}'


@pytest.fixture
def make_sweep(make_config, tmp_path: Path) -> Callable[..., Sweep]:
    def make(text: str, place: str, *overrides: str) -> Sweep:
        make_config(place)
        path = tmp_path / place / "s.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, overrides)

    return make


def run(sweep: Sweep, runner: Runner) -> dict[str, Any]:
    propose = proposals(sweep.settings)
    path = run_sweep(sweep, runner=runner, decide=decisions(sweep), propose=propose, echo=quiet)
    return json.loads(path.read_text("utf-8"))


def reports(sweep: Sweep) -> list[dict[str, Any]]:
    """What the sweep remembers, in its order."""
    path = sweep.folder / STATE_FILE
    return json.loads(path.read_text("utf-8"))["reports"] if path.exists() else []


def test_asha_ends_what_is_not_among_the_best_so_far() -> None:
    decide = asha_decisions(first_rung=2, reduction_factor=2, max_steps=8)  # rungs 2, 4, 8
    assert decide(0, 0, 0.2)  # before the first rung nothing is decided
    assert decide(0, 2, 0.5)  # nobody is there to be compared with
    assert decide(1, 2, 0.75)
    assert not decide(2, 2, 0.6)  # below 0.625, the median of 0.5 and 0.75
    assert decide(3, 2, 0.65)  # above 0.6, the median of three
    assert decide(0, 4, 0.25)  # the first at its rung, however bad
    assert not decide(1, 8, 0.99)  # all steps are done


def test_asha_asked_again_in_the_same_order_decides_the_same() -> None:
    asked = [(trial, step, ((7 * trial + step) % 11) / 11) for step in (2, 4) for trial in range(9)]
    first, second, other = (asha_decisions(2, 2, 8) for _ in range(3))
    answers = [first(*each) for each in asked]
    assert [second(*each) for each in asked] == answers
    assert len(set(answers)) == 2
    backwards = [other(*each) for each in reversed(asked)][::-1]
    assert backwards != answers  # the order matters, which is why it is remembered


def test_optuna_proposes_by_seed_trial_and_the_accuracies_known(tmp_path: Path) -> None:
    """Of 20 known trials the better ones have the larger rates in one journal, the smaller ones in
    the other; the mean of 10 proposals follows."""
    pytest.importorskip("optuna")
    space = {
        "outer.lr": {"log_uniform": [1e-4, 1.0]},
        "inner.num_steps": {"integer": [1, 3]},
        "inner.frozen": {"choice": [["a"], ["b"]]},
    }
    known = {"name": "s", "title": "T", "config": "c", "space": space, "search": "optuna"}
    settings = SweepConfig.model_validate(known | {"num_trials": 20})
    propose = proposals(settings)
    means = {}
    for better in ("larger", "smaller"):
        journal = Journal(tmp_path / better, {}, lambda *_: True)
        for trial in range(20):
            values = draw_values(settings, trial)
            journal.begin(trial, values)
            share = 1 + math.log10(values["outer.lr"]) / 4  # 0 at 1e-4, 1 at 1
            accuracy = share if better == "larger" else 1 - share
            journal.report(trial, Validation(step=3, accuracy=accuracy, ci95=0.1, loss=1.0))
        found = [propose(trial, journal) for trial in range(20, 30)]
        again = Journal(tmp_path / better, {}, lambda *_: True)  # as after a kill
        assert [propose(trial, again) for trial in range(20, 30)] == found
        assert all(1e-4 <= values["outer.lr"] <= 1 for values in found)
        assert {values["inner.num_steps"] for values in found} <= {1, 2, 3}
        assert all(values["inner.frozen"] in (["a"], ["b"]) for values in found)
        means[better] = sum(math.log10(values["outer.lr"]) for values in found) / 10
    assert means["smaller"] < -2 < means["larger"]


@pytest.mark.ray
@pytest.mark.parametrize("text", [ASHA, OPTUNA])
def test_a_killed_sweep_goes_on_to_the_table_of_an_undisturbed_one(
    joining, make_sweep, start, text
):
    """One trial at a time: then reports, and what Optuna knows, have the order of the trials."""
    if text is OPTUNA:
        pytest.importorskip("optuna")
    lone, killed = make_sweep(text, "lone"), make_sweep(text, "killed")
    expected = run(lone, run_in_order)
    if text is ASHA:
        statuses = {trial["status"] for trial in expected["trials"]}
        assert statuses == {"done", "stopped"}  # else nothing was decided

    command = start("sweep", killed.origin, **joining)
    command.wait_until(lambda: len(reports(killed)) >= 4, "at the fourth report")
    command.kill()
    command.clean_up()
    assert len(reports(killed)) < len(reports(lone))
    content = run(killed, run_on_tune)

    assert reports(killed) == reports(lone)
    assert content["trials"] == expected["trials"]
    for one, other in zip(killed.checked, lone.checked, strict=True):
        assert_same_bits(one.config, other.config)


@pytest.mark.ray
def test_trials_with_workers_of_their_own_end_in_the_bits_of_a_lone_process(
    joining, make_sweep, start
):
    """Trial 0 is done and trial 1 stopped at the first rung, exactly there.

    By a command: Tune kills the last trial while its controller ends the workers, and what that had
    reserved is free when the job ends.
    """
    text = f"{SPACE}num_trials: 2\nmax_concurrent_trials: 1\nworkers_per_trial: 2\n"
    together = make_sweep(text, "together")
    lone = make_sweep(text, "lone")

    command = start("sweep", together.origin, **joining)
    assert command.finish() == 0, command.errors
    content = json.loads((together.folder / "sweep.json").read_text("utf-8"))
    expected = run(lone, run_in_order)

    assert reports(together) == reports(lone)
    assert content["trials"] == expected["trials"]
    for one, other in zip(together.checked, lone.checked, strict=True):
        assert_same_bits(one.config, other.config)


@pytest.mark.ray
@pytest.mark.fault("worker killed")
def test_a_trial_that_fails_is_recorded_and_one_whose_process_is_killed_is_tried_again(
    cluster, make_sweep
):
    sweep = make_sweep(
        "name: s\ntitle: A sweep\nconfig: config.yaml\nscheduler: none\nmax_concurrent_trials: 1\n"
        "space: {inner.lr: {grid: [0.1, 1.0e+30, 0.2]}}\nset: {outer.num_steps: 60}\n",
        "run",
    )

    def kill_it() -> None:
        wait_until(lambda: len(reports(sweep)) >= 5, "at the fifth report")
        os.kill(pids("ImplicitFunc")[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    content = run(sweep, run_on_tune)
    killer.join()

    found = {each["trial"]: (each["status"], each["problem"]) for each in content["trials"]}
    assert (found[0], found[2]) == (("done", None), ("done", None))
    assert found[1][0] == "failed"
    assert "not finite" in found[1][1]
    configs = [trial.config for trial in sweep.checked]
    assert attempts(configs[0].run_folder) == 2
    for config in (configs[0], configs[2]):
        alone = config.model_copy(update={"name": f"{config.name}-alone"})
        assert train_locally(alone, quiet)
        assert_same_bits(config, alone)


@pytest.mark.ray
def test_a_full_disk_ends_the_sweep_and_is_no_failing_of_a_trial(cluster, make_sweep):
    space = SPACE.replace("[transductive, context]", "[none]")
    sweep = make_sweep(f"{space}scheduler: none\n", "run", FULL)
    with pytest.raises(UserError, match=r"scratch: cannot be read or written .* make room"):
        run(sweep, run_on_tune)
    assert reports(sweep) == []


@pytest.mark.ray
def test_more_workers_a_trial_than_the_cluster_has_room_for(cluster, make_sweep):
    sweep = make_sweep(f"{SPACE}workers_per_trial: 5\n", "run")
    with pytest.raises(UserError, match="workers_per_trial is 5 but the Ray cluster has room for"):
        run(sweep, run_on_tune)
