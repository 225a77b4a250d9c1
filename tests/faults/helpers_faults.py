"""What the tests of faults share; imported by workers as well, for the encoders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from raymaml.config.schema import Config
from raymaml.storage.files import sha256_of_file
from raymaml.storage.place import Place
from raymaml.training.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_steps,
    read_card,
    weights_of,
)

CPU = torch.device("cpu")


def quiet(_line: str) -> None:
    pass


def bits(folder: Place, which: Literal["best", "last"] = "last") -> dict[str, bytes]:
    """Return the bits of the weights and running moments in a checkpoint of a run."""
    path = find_checkpoint(folder, which)
    return {name: value.numpy().tobytes() for name, value in weights_of(path, CPU).items()}


def assert_same_bits(one: Config, other: Config) -> None:
    """Fail unless two runs end in the same tensors, bit by bit, naming those that differ."""
    found, expected = bits(one.run_folder), bits(other.run_folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def stands_whole(folder: Path) -> None:
    """Every checkpoint has the files and hashes of its card, and nothing partial is left."""
    assert list(folder.rglob(".*.partial-*")) == []
    for step in list_steps(folder):
        path = checkpoint_path(folder, step)
        for name, sha256 in read_card(path).files.items():
            assert sha256_of_file(path / name) == sha256
    for file in folder.glob("run.json"):
        json.loads(file.read_text(encoding="utf-8"))


def copied(config: Config, name: str, place: Path) -> Config:
    """Return a config of the same run under another name and in another place."""
    copy = config.model_copy(update={"name": name, "run_dir": place})
    shutil.copytree(config.run_folder, copy.run_folder)
    return copy


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``raymaml`` in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "raymaml", *arguments], capture_output=True, text=True, check=False
    )


class Hungry(nn.Module):
    """An encoder that asks for a pebibyte: PyTorch's allocator refuses it on every machine.

    Up to ``enough`` images it asks for nothing; with two it is tried out.
    """

    def __init__(self, enough: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 4)
        self.enough = enough

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.enough:
            torch.empty(1 << 50, dtype=torch.uint8)
        return self.linear(images.flatten(1)[:, :1])


class Full(nn.Module):
    """An encoder that finds the disk full, at all but the two images with which it is tried out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 4)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scratch")
        return self.linear(images.flatten(1)[:, :1])
