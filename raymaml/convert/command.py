"""``raymaml convert``: files of the reference to files of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raymaml.common.errors import UserError, gathered
from raymaml.config.explain import validated
from raymaml.config.schema import Config
from raymaml.config.yaml_text import Origins, dump_mapping, read_yaml
from raymaml.convert.learner import Saved, load_reference, load_weights
from raymaml.convert.reference import Testing, Training, kind_of
from raymaml.convert.settings import whole_config
from raymaml.storage.files import write_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import checkpoint_path, list_steps, write_checkpoint
from raymaml.training.identity import identity_of
from raymaml.training.state import build_state

Echo = Callable[[str], None]


def convert_files(
    paths: Sequence[Path], checkpoint: Path | None, out: Path, name: str | None, echo: Echo
) -> None:
    """Write our configuration, and the run folder of a checkpoint, so that `raymaml test` runs.

    Args:
        paths: a training configuration of the reference, a test configuration, or both.
        checkpoint: its ``.pth``; it can stand for the training configuration.
        out: the YAML to write.
        name: of the run; the reference's name for it if None.
        echo: receives the paths that were written, and the notes about them.

    Raises:
        UserError: naming everything that has no counterpart; nothing is written then.
    """
    saved = load_reference(checkpoint) if checkpoint is not None else None
    train, test = _read(paths, checkpoint, saved)
    tree, notes = whole_config(saved.model if saved else train, train, test, name)
    if train.load and saved is None:
        notes.append(f"load: {train.load[:200]!r} is left out; give it as --checkpoint")
    config = validated(Config, tree, str(out))
    if out.exists():
        raise UserError(f"{out}: exists", remedy="remove it, or give another --out")
    if saved is not None:
        written = _write_run(config, saved, train.train.image_size)
        echo(f"{written}: the weights of {checkpoint}, ready for `raymaml test {out}`")
    origin = " and ".join(str(path) for path in (*paths, checkpoint) if path is not None)
    header = [f"From {origin}, settings of fmu2/PyTorch-MAML.", *notes]
    write_text(out, "".join(f"# {line}\n" for line in header) + dump_mapping(tree))
    for line in (*notes, str(out)):
        echo(line)


def _read(
    paths: Sequence[Path], checkpoint: Path | None, saved: Saved | None
) -> tuple[Training, Testing | None]:
    """Return the configurations, the first perhaps from the checkpoint."""
    files: list[tuple[Path | None, Mapping[str, Any], Origins]]
    files = [(path, *read_yaml(path)) for path in paths]
    if saved and saved.config and all(kind_of(tree) is Testing for _, tree, _ in files):
        files.append((checkpoint, saved.config, {}))
    found: dict[type, Any] = {}
    given = " and ".join(str(path) for path, _, _ in files)
    with gathered() as mistakes:
        for path, tree, origins in files:
            kind = kind_of(tree)
            if kind in found:
                name = kind.__name__.lower()
                mistakes.add(f"{given}: hold more than one {name} configuration", "give one")
            found[kind] = None
            with mistakes.kept():
                found[kind] = validated(kind, tree, str(path), origins)
        if Training not in found:
            why = f"{given}: is a testing configuration, which names no model"
            remedy = "give the training configuration, or a checkpoint that holds it, as well"
            mistakes.add(why if given else "no file is given", remedy)
    return found[Training], found.get(Testing)


def _write_run(config: Config, saved: Saved, size: int) -> Place:
    if list_steps(config.run_folder):
        raise UserError(f"{config.run_folder}: holds checkpoints", remedy="give another --name")
    shape = (3, size, size)
    state = build_state(config, shape, torch.device("cpu"))
    load_weights(state.learner.model, saved.weights, head_too=config.model.head != "zero")
    state.step = config.outer.num_steps
    path = checkpoint_path(config.run_folder, state.step)
    write_checkpoint(path, state, identity_of(config, shape, bank_hash=""))
    return path
