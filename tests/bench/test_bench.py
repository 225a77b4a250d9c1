"""`raymaml bench`: a failing contender is left out, and a run writes the promised files."""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_bench import tiny
from PIL import Image

from raymaml.bench import measure
from raymaml.bench.contenders import EXACT_METHODS, PHASES, Contender, Phase, why_not
from raymaml.bench.measure import Contestant, drop_failing, effort
from raymaml.bench.report import Row, table
from raymaml.bench.worker import AtenCalls, peak_mib
from raymaml.cli import main
from raymaml.config.load import dump_config

CPU = torch.device("cpu")
ROW_KEYS = {
    *("config", "phase", "library", "method", "processes", "threads", "inner_steps"),
    *("at_once", "graph"),
    *("episodes_per_second", "peak_mib", "aten_calls", "difference", "difference_float64"),
}


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"norm": "episodic"}}, "does without model.norm episodic"),
        ({"model": {"norm": "instance"}}, None),
        ({"model": {"norm": {"policy": "transductive", "scale": False}}}, None),
        (
            {"model": {"norm": {"policy": "transductive", "per_step": "affine"}}},
            "does without model.norm transductive per_step=affine",
        ),
        ({"model": {"head": "zero"}}, "does without model.head zero"),
        ({"inner": {"frozen": ["head"]}}, "does without parameters that do not adapt"),
        ({"evaluation": {"inner": {"momentum": 0.9}}}, "does without inner.momentum"),
        ({"inner": {"rule": "adam", "keep_every": 2}}, "does without inner.rule, inner.keep_every"),
    ],
)
def test_features_that_plain_pytorch_lacks_are_named(
    sections: dict[str, Any], reason: str | None
) -> None:
    config = tiny(**sections)
    model = Contender("raymaml", "unrolled", config=config, device=CPU).model
    assert why_not("plain", config, model) == reason


def test_a_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    model = torch.nn.Linear(1, 1)
    assert why_not("higher", tiny(), model) == "not installed (pip install raymaml[bench])"


def test_calls_are_counted_alike_each_time() -> None:
    def count(num_steps: int) -> int:
        config = tiny(inner={"num_steps": num_steps, "lr": 0.1})
        contender = Contender("raymaml", "unrolled", config=config, device=CPU)
        with AtenCalls() as calls:
            contender.compute("training")
        return calls.count

    assert 0 < count(1) < count(2) == count(2)


def test_peak_memory_is_that_of_the_work() -> None:
    peak = peak_mib(lambda: torch.ones(64 << 18).sum(), CPU)  # 64 MiB
    assert peak is not None
    assert 60 < peak < 80


@pytest.mark.slow
def test_a_contender_that_fails_or_is_killed_is_left_out_with_the_reason() -> None:
    said: list[str] = []
    row = Row(
        config="tiny",
        phase="training",
        library="raymaml",
        method="no_method",
        threads=1,
        inner_steps=2,
    )
    with ExitStack() as stack:
        rows = [row, replace(row, method="unrolled")]
        everyone = [Contestant(each, tiny(), stack) for each in rows]

        def act(each: Contestant) -> None:
            if each.row.method == "unrolled":
                limit = each._pool.submit(resource.getrlimit, resource.RLIMIT_DATA).result()
                pages = os.sysconf("SC_PHYS_PAGES")
                assert limit[0] == pages * os.sysconf("SC_PAGE_SIZE")  # the machine's memory
                each._pool.submit(signal.raise_signal, signal.SIGKILL).result()
            each.measure(1, "speed")

        drop_failing(everyone, act, said.append)
    assert everyone == []
    assert said[0] == "  raymaml no_method: left out from here on: 'no_method'"
    assert said[1].endswith("its process was ended, as the system does when memory runs out")


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("library", ["raymaml", "plain"])
def test_copies_at_once_give_what_one_episode_gives(library: str, phase: Phase) -> None:
    options: dict[str, Any] = {"config": tiny(), "device": CPU, "dtype": torch.float64}
    for method in EXACT_METHODS if library == "raymaml" else ["unrolled"]:
        one = Contender(library, method, **options).compute(phase)
        several = Contender(library, method, **options, at_once=3).compute(phase)
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-10)


def test_evaluation_may_have_other_ways_than_training() -> None:
    split = {"num_ways": 3, "num_shots": 1, "num_queries": 2, "num_episodes": 1}
    splits = {"train": split, "val": split, "test": {**split, "num_ways": 2}}
    config = tiny(episodes=splits, model={"width": 2, "head": "zero"})
    for count in (1, 2):
        contender = Contender("raymaml", "unrolled", config=config, device=CPU, at_once=count)
        assert contender.compute("evaluation").shape == (2 * 2 * 2,)


def test_on_a_gpu_several_episodes_and_graphs_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "local_device", lambda _cluster: torch.device("cuda"))
    how = effort("mixed_mode,plain,higher", "", 1, 1)
    monkeypatch.setattr(measure, "why_not", lambda *_arguments: None)
    found = [row.contender for row in measure._contenders(tiny(), how, lambda _line: None)]
    each = ["", " x16", " x16 graph", " x64", " x64 graph"]
    wanted = [f"{name}{more}" for name in ("raymaml mixed_mode", "plain") for more in each]
    assert found == [*wanted, "higher"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymaml.bench.measure.number_of_cores", lambda: 1)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny()), encoding="utf-8")
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "bench.png")]
    effort = ["--repeats", "2", "--episodes", "1", "--methods", "unrolled,plain", "--steps", "1,2"]
    done = CliRunner().invoke(main, ["bench", str(path), *files, *effort])
    assert done.exit_code == 0, (done.output, done.exception)
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert content["machine"]["torch"] == torch.__version__.partition("+")[0]
    rows = [Row(**row) for row in content["rows"]]
    assert all(set(row) == ROW_KEYS for row in content["rows"])
    main_rows = [(row.phase, row.contender, row.processes) for row in rows if row.aten_calls]
    assert main_rows == [
        ("training", "raymaml unrolled", 1),
        ("training", "raymaml unrolled", 2),
        ("training", "plain", 1),
        ("training", "plain", 2),
        ("evaluation", "raymaml adapt", 1),
        ("evaluation", "raymaml adapt", 2),
        ("evaluation", "plain", 1),
        ("evaluation", "plain", 2),
    ]
    points = [(row.contender, row.inner_steps) for row in rows if not row.aten_calls]
    assert points == [("raymaml unrolled", 1), ("plain", 1)]
    assert all(row.episodes_per_second > 0 for row in rows)
    assert all(row.difference_float64 < 1e-9 for row in rows if row.difference_float64 is not None)
    assert table(rows) in done.output
    assert "each at its best: raymaml" in done.output
    with Image.open(tmp_path / "bench.png") as image:
        assert image.format == "PNG"
        image.load()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "unroled"], "--methods: 'unroled' is unknown; give some of unrolled,"),
        (["--at-once", "0"], "--at-once: '0' is no number of episodes; give numbers from 1 to"),
        (["--steps", "1,-5"], "--steps: '-5' is no number of inner steps"),
        (["--steps", "1000000000"], "is no number of inner steps; give numbers below 100,000"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_user_errors(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
