"""`raymaml init`: the shipped configs come with the package, and one becomes a starter."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from raymaml.cli import main
from raymaml.config.load import load_config
from raymaml.config.starters import STARTERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", STARTERS)
def test_a_starter_is_the_shipped_config_and_names_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(main, ["init", name])
    assert outcome.exit_code == 0, outcome.output
    path = tmp_path / f"{name}.yaml"
    assert load_config(path) == load_config(ROOT / "configs" / STARTERS[name])
    text = path.read_text("utf-8")
    assert f"raymaml data import {name}.yaml" in text
    assert "configs/" not in text
    assert outcome.output.splitlines()[1] == f"  raymaml data import {name}.yaml"


def test_a_starter_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images.yaml").write_text("mine", encoding="utf-8")
    outcome = CliRunner().invoke(main, ["init"])
    assert (outcome.exit_code, len(outcome.output.splitlines())) == (2, 1)
    assert "images.yaml: is there already" in outcome.output
    assert Path("images.yaml").read_text("utf-8") == "mine"
    outcome = CliRunner().invoke(main, ["init", "imagse"])
    assert outcome.exit_code == 2
    assert "'images', 'glyphs', 'omniglot'" in outcome.output


@pytest.mark.slow
def test_a_wheel_holds_every_config(tmp_path: Path) -> None:
    source = tmp_path / "source"  # pip leaves its build folder there
    for name in ("raymaml", "configs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    shipped = {f"raymaml/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert packed == shipped
    assert len(packed) > 20
