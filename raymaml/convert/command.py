"""``raymaml convert``: files of the reference to files of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raymaml.common.errors import UserError
from raymaml.config.load import check_config
from raymaml.config.schema import Config
from raymaml.config.yaml_text import dump_mapping, read_mapping
from raymaml.convert.learner import described_model, image_size, load_reference, load_weights
from raymaml.convert.model import inner_settings, merged
from raymaml.convert.settings import (
    completed,
    default_name,
    find_problems,
    is_test_config,
    whole_config,
)
from raymaml.convert.shape import require_form
from raymaml.storage.files import write_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import checkpoint_path, list_steps, write_checkpoint
from raymaml.training.state import build_state

Echo = Callable[[str], None]
Mappings = tuple[Mapping[str, Any], Mapping[str, Any] | None]


def convert_files(
    paths: Sequence[Path], checkpoint: Path | None, out: Path, name: str | None, echo: Echo
) -> None:
    """Write our configuration, and the run folder of a checkpoint, so that `raymaml test` runs.

    Args:
        paths: a training configuration of the reference, a test configuration, or both.
        checkpoint: its ``.pth``; it can stand for the training configuration.
        out: the YAML to write.
        name: of the run; the reference's name for it if None.
        echo: receives what was written and what to know about it.

    Raises:
        UserError: naming everything that has no counterpart; nothing is written then.
    """
    saved = load_reference(checkpoint) if checkpoint is not None else {}
    train, test = _roles(paths, saved)
    train, examples = completed(merged(train, saved))
    if problems := find_problems(train, test):
        raise UserError(*problems)
    tree, notes = _converted(train, test, name)
    notes = [*examples, *notes]
    if train.get("load") and checkpoint is None:
        notes.append(f"load: {train['load']} is left out; give it as --checkpoint")
    if train["dataset"] == "meta-cub200":
        notes.append("data.source.split: the reference reads its classes from CSVs; check the name")
    config = check_config(tree, str(out))
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or give another --out")
    if checkpoint is not None:
        written = _write_run(config, saved, image_size(train))
        echo(f"{written}: the weights of {checkpoint}, ready for `raymaml test {out}`")
    origin = " and ".join(str(path) for path in (*paths, *([checkpoint] if checkpoint else [])))
    header = [f"From {origin}, settings of fmu2/PyTorch-MAML.", *notes]
    write_text(out, "".join(f"# {line}\n" for line in header) + dump_mapping(tree))
    for line in (*notes, str(out)):
        echo(line)


def _roles(paths: Sequence[Path], saved: Mapping[str, Any]) -> Mappings:
    """Tell the training configuration from that of the test; the checkpoint holds the former."""
    read = {path: read_mapping(path) for path in paths}
    for path, config in read.items():
        require_form(config, path)
    tests = [path for path in paths if is_test_config(read[path])]
    trains = [path for path in paths if path not in tests]
    for kind, found in (("test", tests), ("training", trains)):
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both {kind} configurations; give one")
    train = read[trains[0]] if trains else saved.get("config")
    if not isinstance(train, Mapping):
        given = "nothing is given"
        if saved:
            given = "the checkpoint holds no configuration"
        elif tests:
            given = f"{tests[0]}: is a test configuration, which names no model"
        raise UserError(f"{given}; give the training configuration, or the checkpoint, as well")
    return train, read[tests[0]] if tests else None


def _converted(
    train: Mapping[str, Any], test: Mapping[str, Any] | None, name: str | None
) -> tuple[dict[str, Any], list[str]]:
    model, _, theirs = described_model(train)
    inner, notes = inner_settings(train, theirs)
    test_inner, test_notes = inner_settings(test, theirs) if test is not None else (None, [])
    notes = [*notes, *(f"test: {note}" for note in test_notes)]
    resets = [
        bool((c.get("inner_args") or {}).get("reset_classifier")) for c in (train, test or {})
    ]
    if test is not None and resets[0] != resets[1]:
        raise UserError(
            f"inner_args.reset_classifier: training says {resets[0]}, the test {resets[1]};"
            " raymaml has one model.head for both"
        )
    if model["encoder"] == "resnet10":
        notes.append(f"model.encoder: the reference's {train['encoder']} has one block a stage")
    tree = whole_config(
        train,
        test,
        name=name if name is not None else default_name(train),
        model=_plain(model),
        inner=_plain(inner),
        test_inner=None if test_inner is None else _plain(test_inner),
    )
    return tree, notes


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section as YAML writes it: lists for tuples."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}


def _write_run(config: Config, saved: Mapping[str, Any], size: int) -> Place:
    if list_steps(config.run_folder):
        raise UserError(f"{config.run_folder}: holds checkpoints; give another --name")
    shape = (3, size, size)
    state = build_state(config, shape, torch.device("cpu"))
    load_weights(state.learner.model, saved, head_too=config.model.head != "zero")
    state.step = config.outer.num_steps
    path = checkpoint_path(config.run_folder, state.step)
    write_checkpoint(path, state, config, image_shape=shape, bank_hash="")
    return path
