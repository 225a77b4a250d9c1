"""Run folders as earlier versions wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

NEW = ("preprocessing", "train_classes")


def as_before(checkpoint: Path, weights: dict[str, Any] | None = None) -> None:
    """Turn a checkpoint into one of schema version 2: a torch file, and a card without pictures.

    ``weights`` are those to put in; None keeps its own.
    """
    file = checkpoint / "params.safetensors"
    if weights is None:
        weights = safetensors.torch.load_file(file)
    file.unlink(missing_ok=True)
    torch.save(weights, checkpoint / "params.pt")
    card = json.loads((checkpoint / "checkpoint.json").read_text())
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in checkpoint.glob("*.pt")}
    card = {key: value for key, value in card.items() if key not in NEW}
    card |= {"schema_version": 2, "files": sums}
    (checkpoint / "checkpoint.json").write_text(json.dumps(card))


def run_as_before(folder: Path) -> None:
    """Turn a run folder into one of schema version 2."""
    for checkpoint in folder.glob("checkpoint_*"):
        as_before(checkpoint)
    run = json.loads((folder / "run.json").read_text())
    run.pop("preprocessing", None)
    (folder / "run.json").write_text(json.dumps(run | {"schema_version": 2}))
