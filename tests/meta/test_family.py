"""The vectors of the MAML family where they are at hand, and that their check can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from family_cases import main
from helpers_data import SHARED

Change = Callable[[Path], None]
FAMILY = SHARED / "family"
CASES = sorted(path.parent.name for path in FAMILY.glob("*/config.yaml"))


def folder(name: str) -> Path:
    if not (FAMILY / name / "expected.npz").is_file():
        pytest.skip(f"{FAMILY / name} is not there")
    return FAMILY / name


@pytest.mark.parametrize("name", CASES or ["anil"])
def test_a_case_is_within_its_bounds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(folder(name))])
    assert code == 0, capsys.readouterr().out


def changed_expectation(case: Path) -> None:
    with np.load(case / "expected.npz") as file:
        expected = dict(file)
    expected["grad/layer2.bias"][3] += 1e-3  # of about 0.1: well over both bounds
    np.savez(case / "expected.npz", **expected)


def more_expectations(case: Path) -> None:
    with np.load(case / "expected.npz") as file:
        expected = dict(file)
    np.savez(case / "expected.npz", **expected, grad_temperature=np.ones(()))


def setting(**settings: object) -> Change:
    def change(case: Path) -> None:
        path = case / "config.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8")) | settings
        path.write_text(yaml.safe_dump(config), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_expectation, "  grad: "),
        (more_expectations, "grad_temperature is not known"),
        (setting(method="CAVIA"), "method: 'CAVIA'; known are"),
        (setting(inner_optimizer="Lion"), "inner rule: 'lion'; known are"),
        (setting(order=3), "order: 3; known are"),
        (lambda case: (case / "initial.npz").unlink(), "initial.npz"),
    ],
)
def test_the_check_fails_and_says_why(
    change: Change, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = tmp_path / "changed"
    shutil.copytree(folder("sinusoid-5shot"), case)
    change(case)
    assert main([str(case)]) == 1
    assert said in capsys.readouterr().out


def test_no_case_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "give folders" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 1
    assert "config.yaml" in capsys.readouterr().out
