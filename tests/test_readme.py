"""What the pages and the configs tell people to run: it parses, and the Python runs."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from raymaml.cli import main
from raymaml.config.load import load_config, load_study, load_sweep
from raymaml.training.worker import train_locally

ROOT = Path(__file__).resolve().parents[1]
TOP = ("raymaml", "configs", "launch", "tests")
PAGES = [
    ROOT / "README.md",
    *sorted(page for top in TOP for page in (ROOT / top).rglob("README.md")),
]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def blocks(text: str) -> list[str]:
    """Return the indented blocks of a page without their indentation."""
    found = re.findall(r"(?m)(?:^ {4}.*\n|^\n(?=\n* {4}))+", text)
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


def python_blocks() -> list[str]:
    return [block for block in blocks(TEXT) if block.startswith("import ")]


def commands() -> Iterator[str]:
    """Yield each command line of raymaml, without ``raymaml``."""
    for block in blocks(TEXT):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("raymaml "):
                yield line.removeprefix("raymaml ").split("#")[0]
    spans = re.findall(r"`raymaml ([^`]*)`", TEXT.replace("\n", " "))
    comments = "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS)
    lines = re.findall(r"^#\s+raymaml (.*)$", comments.replace("\\\n#", " "), flags=re.M)
    yield from dict.fromkeys([*spans, *lines])


def parsed(words: list[str]) -> click.Context:
    """Parse a command line as the program does; click raises where it is wrong."""
    context = main.make_context("raymaml", list(words))
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        assert name is not None
        assert command is not None
        if not rest and not isinstance(command, click.Group):
            return context  # the mere name of a command
        context = command.make_context(name, rest, parent=context)
    return context


def test_there_is_something_to_check() -> None:
    assert len(python_blocks()) >= 7
    assert len(list(commands())) >= 25


@pytest.mark.parametrize("line", list(commands()))
def test_each_command_parses_and_its_config_is_there(line: str) -> None:
    words = shlex.split(line)
    assert parsed(words)
    if "s3://" in line:
        pytest.importorskip("s3fs")
    readers: dict[str, Any] = {"study": load_study, "sweep": load_sweep}
    for word in words:
        if word.startswith("configs/"):
            reader = readers.get(words[0], load_config)
            overrides = [each for each in words if "=" in each]
            assert reader(ROOT / word, *([overrides] if reader is load_config else []))


def test_scripts_and_extras_that_are_named_are_there() -> None:
    for script in re.findall(r"(?:bash|python) ((?:launch|tests)/[\w./-]+)", TEXT):
        assert (ROOT / script).exists(), script
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8").split("[options.extras_require]")[1]
    for extra in re.findall(r"raymaml\[(\w+)\]", TEXT):
        assert f"\n{extra} =" in setup, extra


def test_the_yaml_is_understood(tmp_path: Path) -> None:
    data = next(block for block in blocks(TEXT) if block.startswith("data:"))
    (tmp_path / "c.yaml").write_text(
        f"name: a\n{data}\nepisodes: {{train: {{num_episodes: 1}}, val: {{num_episodes: 1}},"
        " test: {num_episodes: 1}}\nouter: {num_steps: 1}\n"
    )
    assert load_config(tmp_path / "c.yaml").data.image_size == 84
    space = next(block for block in blocks(TEXT) if block.startswith("space:"))
    (tmp_path / "s.yaml").write_text(f"name: s\ntitle: T\nconfig: c.yaml\n{space}\n")
    assert load_sweep(tmp_path / "s.yaml").count == 12


@pytest.mark.parametrize(
    ("holds", "result", "shape"),
    [
        ("my_episodes", "logits", (4, 75, 5)),
        ("images, labels =", "logits", (4, 75, 5)),
    ],
)
def test_the_python_runs_as_written(holds: str, result: str, shape: tuple[int, ...]) -> None:
    """At 16x16 instead of 84x84, so that it is quick."""
    code = next(block for block in python_blocks() if holds in block)
    names: dict[str, Any] = {}
    exec(compile(code.replace("84", "16"), "README.md", "exec"), names)
    assert names[result].shape == shape
    assert names["loss"].isfinite().all()
    params = names["learner"].params
    grads = names.get("grads") or {n: v.grad for n, v in params.items() if v.grad is not None}
    assert grads.keys() == params.keys()


def test_an_encoder_is_created_as_written() -> None:
    code = next(block for block in python_blocks() if "create_encoder" in block)
    names: dict[str, Any] = {}
    exec(compile(code.replace("84", "16"), "README.md", "exec"), names)
    assert names["model"](torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_the_commands_run_from_python_as_written(
    make_config: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_config("tiny")
    code = next(block for block in python_blocks() if "raymaml.episodes" in block)
    config = tmp_path / "tiny" / "config.yaml"
    code = code.replace("configs/glyphs/quickstart.yaml", str(config)).replace("=100", "=1")
    exec(compile(code, "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "torch.Size([4, 3, 1, 16, 16]) torch.Size([4, 6, 1, 16, 16])"


def test_links_and_pictures_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_files_that_are_named_are_there() -> None:
    """From the root, from the package, or from the page; ``test_x.py`` anywhere below tests."""
    for page in PAGES:
        for name in re.findall(
            r"`([\w/.-]+\.(?:py|sh|yaml))`|# ([\w/]+\.py)$", page.read_text(), re.M
        ):
            named = "".join(name)
            places = (ROOT, ROOT / "raymaml", page.parent, page.parent.parent)
            there = any((place / named).exists() for place in places)
            assert there or list(ROOT.rglob(f"tests/**/{named}")), f"{page}: {named}"


def test_the_readme_is_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_a_run_folder_is_opened_as_written(make_config: Any) -> None:
    config = make_config("tiny", "outer.num_steps=1")
    assert train_locally(config, lambda _line: None)
    code = next(block for block in python_blocks() if "open_trained" in block)
    code = code.replace("runs/glyphs-5way-1shot", str(config.run_folder))
    names: dict[str, Any] = {}
    exec(compile(code.replace("launch/", f"{ROOT}/launch/"), "README.md", "exec"), names)
    assert names["tensor"].shape == (1, 1, 16, 16)
    assert names["weights"].keys() == names["learner"].params.keys()


def test_models_of_others_are_judged_as_written(
    make_config: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a tiny config, and 6 episodes instead of 600."""
    assert train_locally(make_config("tiny", "outer.num_steps=1"), lambda _line: None)
    code = next(block for block in python_blocks() if "nearest_class_mean" in block)
    config = tmp_path / "tiny" / "config.yaml"
    code = code.replace("configs/glyphs/study.yaml", str(config)).replace("=600", "=6")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pixels", "encoder"]
    assert all("Interval(mean=" in line and "count=6" in line for line in lines)
