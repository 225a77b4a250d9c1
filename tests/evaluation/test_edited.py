"""Code that changes after judging: an encoder of one's own, Python, torch."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_evaluation import judge_run
from helpers_faults import quiet

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config
from raymaml.evaluation import arm
from raymaml.evaluation.run_test import plan_report, plan_test
from raymaml.models.source import encoder_source, source_files
from raymaml.reports.write import write_test_report
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")
NET = """\
from torch import nn
from {package}blocks import Block


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, images):
        return self.block(images).mean((2, 3))
"""
BLOCKS = """\
from torch import nn
{more}

class Block(nn.Conv2d):
    def __init__(self):
        super().__init__(1, 4, 3)

    def forward(self, images):
        return super().forward(images) * SCALE
"""
Edit = Callable[[str, str], None]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Write a module, as an editor does between two commands: the next import reads it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path / "code")

    def write(name: str, text: str) -> None:
        path = tmp_path / "code" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for loaded in [each for each in sys.modules if each.partition(".")[0] in TOPS]:
            monkeypatch.delitem(sys.modules, loaded)
        importlib.invalidate_caches()

    return write


TOPS = ("own_net", "blocks", "scale", "own_package", "script", "broken")


@pytest.fixture(params=["modules beside each other", "package"])
def encoder(edit: Edit, request: pytest.FixtureRequest) -> tuple[str, str]:
    """An own encoder, and the module with a number that it imports by way of another."""
    if request.param == "package":
        edit("own_package.__init__", "")
        edit("own_package.net", NET.format(package="."))
        edit("own_package.blocks", BLOCKS.format(more="from own_package.scale import SCALE\n"))
        edit("own_package.scale", "SCALE = 1.0\n")
        return "own_package.net:Net", "own_package.scale"
    edit("own_net", NET.format(package=""))
    edit("blocks", BLOCKS.format(more="from scale import SCALE\n"))
    edit("scale", "SCALE = 1.0\n")
    return "own_net:Net", "scale"


@pytest.fixture
def run(make_config: Any, encoder: tuple[str, str]) -> Config:
    settings = f"model={{encoder: '{encoder[0]}', norm: none}}"
    config: Config = make_config("run", "outer.num_steps=1", settings)
    assert train_locally(config, quiet)
    return config


def judged(config: Config) -> tuple[Path, list[str]]:
    lines: list[str] = []
    path = write_test_report(judge_run(config, lines.append))
    assert isinstance(path, Path)
    return path, lines


def longer(config: Config) -> Config:
    outer = config.outer.model_copy(update={"num_steps": 2})
    return config.model_copy(update={"outer": outer})


def test_the_source_is_that_of_the_module_and_of_what_it_imports(
    edit: Edit, encoder: tuple[str, str]
) -> None:
    model = ModelConfig(encoder=encoder[0], norm="none")
    before = encoder_source(model)
    assert encoder[1] in source_files(model)
    assert not {"torch", "raymaml"} & {name.partition(".")[0] for name in source_files(model)}
    edit("unrelated", "x = 1\n")
    assert encoder_source(model) == before
    edit(encoder[1], "SCALE = 2.0\n")
    changed = encoder_source(model)
    assert changed != before
    edit(encoder[1], "SCALE = 1.0\n")
    assert encoder_source(model) == before
    assert encoder_source(ModelConfig()) is None


def test_a_module_that_is_imported_later_counts_from_the_beginning(edit: Edit) -> None:
    lazy = BLOCKS.format(more="SCALE = 1\ndef later():\n    import scale\n")
    edit("own_net", NET.format(package=""))
    edit("blocks", lazy)
    edit("scale", "x = 1\n")
    model = ModelConfig(encoder="own_net:Net", norm="none")
    before = encoder_source(model)
    importlib.import_module("scale")
    assert encoder_source(model) == before
    assert set(source_files(model)) == {"own_net", "blocks", "scale"}


def test_to_look_for_the_files_runs_none_of_them(edit: Edit) -> None:
    """A script that a function imports from, a module with a syntax error, a name past the top."""
    edit(
        "own_net",
        NET.format(package="")
        + """

def main():
    from script import fit
    from script.more import fit
    import broken
    from ... import nothing
""",
    )
    edit("blocks", BLOCKS.format(more="SCALE = 1.0\n"))
    edit("script", "raise SystemExit(3)\n")
    edit("broken", "def (:\n")
    files = source_files(ModelConfig(encoder="own_net:Net"))
    assert set(files) == {"own_net", "blocks", "script", "broken"}
    assert not {"script", "broken"} & set(sys.modules)


def test_an_edited_encoder_is_judged_again_and_the_reason_said(
    run: Config, edit: Edit, encoder: tuple[str, str]
) -> None:
    first, lines = judged(run)
    before = json.loads(first.read_text())["loss"]["mean"]
    assert not [line for line in lines if "was edited" in line or "judged again" in line]
    assert not [line for line in judged(run)[1] if "CPU worker" in line]  # nothing to judge

    edit(encoder[1], "SCALE = 5.0\n")
    path, lines = judged(run)
    summary = json.loads(path.read_text())
    assert summary["loss"]["mean"] != before
    (again,) = [line for line in lines if "model: judged again" in line]
    assert f"since records are of another source of model.encoder {encoder[0]}" in again
    (said,) = [line for line in lines if "model: model.encoder" in line]
    assert "was edited after training" in said
    assert f"{encoder[1].rpartition('.')[2]}.py" in said
    assert summary["protocol"].endswith(" | encoder edited after training")

    edit(encoder[1], "SCALE = 1.0\n")  # put back: the first records are there
    path, lines = judged(run)
    assert json.loads(path.read_text())["loss"]["mean"] == before
    assert not [line for line in lines if "CPU worker" in line]


def test_a_training_with_an_edited_encoder_does_not_go_on(
    run: Config, edit: Edit, encoder: tuple[str, str]
) -> None:
    edit(encoder[1], "SCALE = 5.0\n")
    with pytest.raises(UserError) as caught:
        train_locally(longer(run), quiet)
    (problem,) = caught.value.problems
    assert (
        f"the source of model.encoder {encoder[0]} was edited after the run was started" in problem
    )
    assert f"{encoder[1].rpartition('.')[2]}.py" in problem
    edit(encoder[1], "SCALE = 1.0\n")
    assert train_locally(longer(run), quiet)


RULE = """\
import raymaml


class Rule(raymaml.Rule):
    def init(self, params):
        return {{}}

    def update(self, grads, state, params, meta, step):
        moved = {{n: params[n] - {size} * meta[f"lr.{{n}}"] * grad for n, grad in grads.items()}}
        return params | moved, state
"""


def test_an_edited_rule_is_judged_again_and_its_training_does_not_go_on(
    edit: Edit, make_config: Any
) -> None:
    edit("own_net", RULE.format(size=1))
    config = make_config("run", "outer.num_steps=1", "inner.rule='own_net:Rule'")
    assert train_locally(config, quiet)
    path, _ = judged(config)
    before = json.loads(path.read_text())["loss"]["mean"]
    assert not [line for line in judged(config)[1] if "CPU worker" in line]  # nothing to judge

    edit("own_net", RULE.format(size=50))
    path, lines = judged(config)
    assert json.loads(path.read_text())["loss"]["mean"] != before
    (again,) = [line for line in lines if "model: judged again" in line]
    assert "since records are of another source of inner.rule own_net:Rule" in again
    said = r"the source of inner\.rule own_net:Rule was edited after the run was started .*own_net"
    with pytest.raises(UserError, match=said):
        train_locally(longer(config), quiet)

    edit("own_net", RULE.format(size=1))  # put back: the first records are there
    path, lines = judged(config)
    assert json.loads(path.read_text())["loss"]["mean"] == before
    assert train_locally(longer(config), quiet)


def test_records_of_another_order_of_images_are_others(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = plan_test(run, CPU).arms[0].identity
    monkeypatch.setattr(arm, "ORDER", 1)
    assert plan_test(run, CPU).arms[0].identity == {**now, "order": "1"} != now


def with_versions(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    found = {"raymaml": "0.1", "torch": "2.9.0", "python": "3.11.7"} | changes
    monkeypatch.setattr(arm, "versions", lambda _model: found)


def test_finished_records_are_rendered_whatever_the_versions(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("run", "outer.num_steps=1")
    assert train_locally(config, quiet)
    with pytest.raises(UserError, match="are not judged yet"):
        plan_report(config)
    with_versions(monkeypatch)
    path, _ = judged(config)
    before = json.loads(path.read_text())
    with_versions(monkeypatch, python="3.11.8", torch="2.9.1")
    path.unlink()
    after = json.loads(write_test_report(plan_report(config)).read_text())
    assert after["identity"]["versions"] == before["identity"]["versions"]
    assert after["accuracy"] == before["accuracy"]

    _, lines = judged(config)  # by the versions at hand
    again = [line for line in lines if "judged again" in line]
    assert len(again) == 3  # model, untrained, no-adaptation
    assert "records are of python 3.11.7 (now 3.11.8), torch 2.9.0 (now 2.9.1)" in again[0]
    newest = json.loads(write_test_report(plan_report(config)).read_text())
    assert "2.9.1" in newest["identity"]["versions"]


def test_an_encoder_that_is_gone_is_not_needed_for_the_report(
    run: Config, edit: Edit, encoder: tuple[str, str]
) -> None:
    path, _ = judged(run)
    edit(encoder[1], "raise ImportError('gone')\n")
    path.unlink()
    assert write_test_report(plan_report(run)) == path
    with pytest.raises(UserError, match="cannot be imported"):
        plan_test(run, CPU)
