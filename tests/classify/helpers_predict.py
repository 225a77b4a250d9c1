"""A trained run, pictures of classes that it has not seen, and the command."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from raymaml.cli import main
from raymaml.config.schema import Config
from raymaml.training.worker import train_locally

CLASSES = ("ant", "bee", "cow")
INDUCTIVE = ("model.norm=context", "model.head=zero")
_trained: dict[tuple[str, ...], Config] = {}


def trained(make_config: Any, factory: pytest.TempPathFactory, *overrides: str) -> Config:
    """Return the config of a run that has taken two steps; tests share it."""
    if overrides not in _trained:
        config: Config = make_config(
            factory.mktemp("run"), "outer.num_steps=2", "outer.validate_every=2", *overrides
        )
        assert train_locally(config, lambda _line: None)
        _trained[overrides] = config
    return _trained[overrides]


def config_file(config: Config) -> Path:
    """Return the YAML of a run of ``trained``."""
    return Path(str(config.run_dir)).parent / "config.yaml"


def pattern(way: int, number: int) -> NDArray[np.uint8]:
    """Return picture ``number`` [16, 16] of a class: coarse squares of its own, under noise."""
    squares = np.random.default_rng([7, way]).integers(0, 2, (4, 4)) * 160
    noise = np.random.default_rng([8, way, number]).integers(0, 32, (16, 16))
    return (np.kron(squares, np.ones((4, 4))) + noise).astype(np.uint8)


def draw(path: Path, way: int, number: int) -> Path:
    """Write a picture; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pattern(way, number)).save(path)
    return path


def draw_classes(folder: Path, shots: Sequence[int] = (2, 2, 2), new: int = 3) -> None:
    """Write ``labelled/<class>/<number>.png``, and ``new/<class>-<number>.png``, others."""
    for way, (name, count) in enumerate(zip(CLASSES, shots, strict=True)):
        for number in range(count):
            draw(folder / "labelled" / name / f"{number}.png", way, number)
        for number in range(new):
            draw(folder / "new" / f"{name}-{number}.png", way, 100 + number)


def predict(*arguments: object, code: int = 0) -> Result:
    """Run ``raymaml predict``, which must end with the exit code."""
    done = CliRunner().invoke(main, ["predict", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
