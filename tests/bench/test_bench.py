"""`raymaml bench`: contenders agree, who does not is found, and a run writes what it promises."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers_bench import tiny
from PIL import Image

from raymaml.bench import contest, measure
from raymaml.bench.cases import configs_to_measure, image_shape, made_up_episode, with_steps
from raymaml.bench.children import Child, ChildError
from raymaml.bench.contenders import EXACT_METHODS, build_contender, what_it_lacks
from raymaml.bench.contest import Contestant, drop_failing
from raymaml.bench.curve import extrapolate
from raymaml.bench.probes import AtenCalls, peak_mib
from raymaml.bench.report import table
from raymaml.bench.rows import Row, disagreements
from raymaml.cli import main
from raymaml.config.load import dump_config
from raymaml.config.schema import Config

CPU = torch.device("cpu")
ROW_KEYS = {
    *("config", "phase", "library", "method", "processes", "threads", "inner_steps"),
    *("episodes_per_second", "peak_mib", "aten_calls", "difference", "difference_float64"),
}


def results(library: str, method: str, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient, [P], and logits in float64; twice, since nothing may be left of an episode."""
    contender = build_contender(library, method, config, CPU)
    contender.model.double()
    before = {name: value.clone() for name, value in contender.model.state_dict().items()}
    training = made_up_episode(config, "training", CPU, torch.float64)
    evaluation = made_up_episode(config, "evaluation", CPU, torch.float64)
    for _ in range(2):
        grads = contender.meta_gradient(training)
        logits = contender.predict(evaluation)
    assert list(grads) == list(before)
    after = contender.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return torch.cat([grad.reshape(-1) for grad in grads.values()]), logits


@pytest.mark.parametrize(
    ("library", "inner"),
    [
        ("plain", {"lr": 0.1, "head_lr": 0.3}),
        ("higher", {"lr": 0.1}),
        ("higher", {"lr": 0.1, "head_lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}),
        ("torchopt", {"lr": 0.1}),
        ("torchopt", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
    ],
)
def test_other_libraries_compute_the_same(library: str, inner: dict[str, Any]) -> None:
    if library != "plain":
        pytest.importorskip(library)
    config = tiny(inner={"num_steps": 3, **inner})
    model = build_contender("raymaml", "unrolled", config, CPU).model
    assert what_it_lacks(library, config, model) == []
    theirs = results(library, "unrolled", config)
    for method in EXACT_METHODS:
        for value, reference in zip(theirs, results("raymaml", method, config), strict=True):
            assert reference.abs().max() > 0
            torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sections", "lacks"),
    [
        ({"model": {"norm": "episodic"}}, ["model.norm episodic"]),
        ({"model": {"norm": {"*conv1*": "context", "*": "instance"}}}, None),
        ({"model": {"norm": "instance"}}, []),
        ({"model": {"head": "zero"}}, ["model.head zero"]),
        ({"inner": {"frozen": ["head"]}}, ["parameters that do not adapt"]),
        ({"evaluation": {"inner": {"momentum": 0.9}}}, ["inner.momentum"]),
    ],
)
def test_what_plain_lacks_is_named(sections: dict[str, Any], lacks: list[str] | None) -> None:
    config = tiny(**sections)
    model = build_contender("raymaml", "unrolled", config, CPU).model
    expected = [f"model.norm {config.model.norm_text}"] if lacks is None else lacks
    assert what_it_lacks("plain", config, model) == expected


def test_who_computes_something_else_is_found() -> None:
    right, wrong = np.array([1.0, -2.0, 0.0]), np.array([1.0, -2.0, 1e-4])
    assert disagreements("gradient", {"a": right, "b": right * (1 + 1e-8)}) == []
    (problem,) = disagreements("gradient", {"a": right, "b": right, "c": wrong})
    assert problem.startswith("gradient: c and a disagree: the relative difference is 5.0e-05")
    for other in (right[:2], np.array([1.0, np.nan, 0.0])):
        assert len(disagreements("gradient", {"a": right, "b": other})) == 1


def test_calls_are_counted_alike_each_time() -> None:
    def count(num_steps: int) -> int:
        config = with_steps(tiny(), num_steps)
        contender = build_contender("raymaml", "unrolled", config, CPU)
        with AtenCalls() as calls:
            contender.meta_gradient(made_up_episode(config, "training", CPU, torch.float32))
        return calls.count

    assert 0 < count(1) < count(2) == count(2)


def test_peak_memory_is_that_of_the_work() -> None:
    peak = peak_mib(lambda: torch.ones(64 << 18).sum(), CPU)  # 64 MiB
    assert peak is None or 60 < peak < 80


def test_memory_is_continued_along_the_line() -> None:
    assert extrapolate({}, 5) is None
    assert extrapolate({10: 7.0}, 5) is None
    assert extrapolate({5: 100.0}, 10) == 100.0
    assert extrapolate({1: 20.0, 5: 100.0, 50: None}, 10) == 200.0


def test_the_standard_configurations() -> None:
    shapes = [image_shape(config) for config in configs_to_measure(None, ())]
    assert shapes == [(3, 84, 84), (3, 84, 84), (1, 28, 28)]


def test_who_ends_is_left_out_and_the_reason_said() -> None:
    child = Child("raymaml", "no_method", 1, CPU)
    contestant = Contestant(library="raymaml", method="no_method", threads=1, children=[child])
    everyone, said = [contestant], list[str]()
    try:
        drop_failing(everyone, lambda each: each.children[0].receive(), said.append)
    finally:
        child.close()
    assert everyone == []
    (line,) = said
    assert line.startswith("  raymaml no_method: left out from here on: KeyError")


def test_a_process_that_the_system_ends_is_said_so() -> None:
    child = Child("plain", "unrolled", 1, CPU)
    try:
        child._process.kill()
        with pytest.raises(ChildError, match="ended by signal 9, as the system does when memory"):
            child.receive()
    finally:
        child.close()


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymaml.bench.contest.missing", lambda name: name != "plain")
    said: list[str] = []
    candidates = contest._candidates(tiny(), ("higher", "plain"), {1, 2}, said.append)
    assert list(candidates) == [("plain", "unrolled", 1), ("plain", "unrolled", 2)]
    assert said == ["  higher: left out: not installed (pip install raymaml[bench])"]


class Acted:
    """Stands for a process of a method whose episode takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def send(self, request: str, **arguments: Any) -> None:
        pass

    def receive(self) -> dict[str, Any]:
        return {}


def test_the_fastest_method_gets_the_whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Child", lambda *_: Acted(1.0))
    speeds = {("raymaml", "slow"): 2.0, ("raymaml", "fast"): 1.0, ("plain", "unrolled"): 0.5}
    everyone: list[Any] = [
        Contestant(library=library, method=method, threads=1, children=[Acted(seconds)])  # type: ignore[list-item]
        for (library, method), seconds in speeds.items()
    ]
    measure._multiply_the_fastest(tiny(), everyone, CPU, print)
    found = [(each.name, len(each.children)) for each in everyone]
    assert found == [("raymaml fast", 2), ("raymaml slow", 1), ("plain", 1)]


def bench(config: Config, folder: Path, *arguments: str) -> Result:
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    files = ["--json", str(folder / "rows.json"), "--plot", str(folder / "bench.png")]
    effort = ["--repeats", "2", "--episodes", "1"]
    return CliRunner().invoke(main, ["bench", str(path), *files, *effort, *arguments])


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymaml.bench.measure.number_of_cores", lambda: 1)
    done = bench(tiny(), tmp_path, "--methods", "unrolled,plain", "--steps", "1,2")
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
        ("evaluation", "raymaml adapt", 1),
        ("evaluation", "raymaml adapt", 2),
        ("evaluation", "plain", 1),
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


@pytest.mark.slow
def test_a_contender_that_computes_something_else_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymaml.bench.measure.number_of_cores", lambda: 1)
    root = Path(importlib.import_module("raymaml").__file__ or "").parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{root}")
    args = {"encoder_args": {"in_channels": 1, "width": 2}}
    config = tiny(model={"encoder": "helpers_bench:Restless", **args})
    done = bench(config, tmp_path, "--methods", "unrolled,plain")
    assert done.exit_code == 2, (done.output, done.exception)
    assert "raymaml: tiny: gradient: plain and raymaml unrolled disagree" in done.output
    assert "raymaml: tiny: logits: plain and raymaml unrolled disagree" in done.output
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "unroled"], "--methods: 'unroled' is unknown; give some of unrolled,"),
        (["--steps", "1,-5"], "--steps: '-5' is no number of inner steps"),
        (["--steps", "1000000000"], "is no number of inner steps; give numbers below 100,000"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_what_users_get_wrong(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
