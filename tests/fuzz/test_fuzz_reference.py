"""Hostile configurations and checkpoints of the reference."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from helpers_fuzz import Fuzz, changed_bytes, changed_tree, hostile_values
from helpers_reference import saved
from hypothesis import strategies as st
from test_fuzz_config import TRICKS, as_yaml
from test_fuzz_runs import hostile_torch, torch_cases, torch_file

from raymaml.convert import from_reference
from raymaml.convert.command import convert_files
from raymaml.convert.learner import load_reference

SECTION = {"image_size": 84, "normalization": True, "n_batch": 2, "n_way": 5, "n_query": 2}
TRAIN: dict[str, Any] = {
    "dataset": "meta-mini-imagenet",
    "train": {**SECTION, "transform": "flip"},
    "val": SECTION,
    "encoder": "convnet4",
    "encoder_args": {"bn_args": {"episodic": ["conv1"], "n_episode": 4}},
    "classifier": "logistic",
    "classifier_args": {"temp": 1.0},
    "inner_args": {"n_step": 1, "encoder_lr": 0.01, "frozen": ["bn"], "first_order": True},
    "optimizer": "adam",
    "optimizer_args": {"lr": 0.001, "milestones": [1], "schedule": "step"},
    "epoch": 2,
}
TEST = {"dataset": "meta-mini-imagenet", "test": SECTION, "epoch": 1, "inner_args": {"n_step": 2}}


def test_configurations(fuzz: Fuzz) -> None:
    paths = [fuzz.place / "train.yaml", fuzz.place / "test.yaml"]
    out = fuzz.place / "ours.yaml"
    honest = [as_yaml(TRAIN), as_yaml(TEST)]
    values = hostile_values(fuzz.root)
    cases = st.one_of(
        st.tuples(changed_tree(TRAIN, values).map(as_yaml), st.just(honest[1])),
        st.tuples(st.just(honest[0]), changed_tree(TEST, values).map(as_yaml)),
        st.tuples(changed_bytes(honest[0]), changed_bytes(honest[1])),
        st.tuples(
            st.sampled_from(TRICKS).map(lambda t: t.encode("utf-8", "replace")), st.just(honest[1])
        ),
    )

    def write(case: tuple[bytes, bytes]) -> None:
        out.unlink(missing_ok=True)
        for path, data in zip(paths, case, strict=True):
            path.write_bytes(data)

    def read(_: object) -> None:
        convert_files(paths, None, out, None, lambda _line: None)

    write((honest[0], honest[1]))
    read(None)
    fuzz(cases, write, read, names=" ")  # what has no counterpart is named by its key


def test_checkpoints(fuzz: Fuzz) -> None:
    honest = saved(TRAIN)
    path, out = fuzz.place / "max-va.pth", fuzz.place / "ours.yaml"
    weights = honest["encoder_state_dict"]
    key = next(iter(weights))
    small = honest | {"encoder_state_dict": {key: weights[key]}}

    def with_weight(value: Any) -> dict[str, Any]:
        return honest | {"encoder_state_dict": weights | {key: value}}

    described = {k: honest[k] for k in ("config", "encoder", "encoder_args", "classifier_args")}
    cases = st.one_of(
        torch_cases({**small, "w": torch.zeros(3)}),
        changed_tree(described, hostile_values(fuzz.root)).map(
            lambda tree: torch_file({**honest, **tree}) if isinstance(tree, dict) else b""
        ),
        st.sampled_from(hostile_torch(weights, torch_file(honest))),
        st.sampled_from(
            [None, weights[key].to(torch.complex64), weights[key].expand(2, -1, -1, -1, -1)]
        ).map(lambda value: torch_file(with_weight(value))),
    )

    def write(data: bytes) -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(fuzz.place / "runs", ignore_errors=True)
        path.write_bytes(data)

    def read(_: object) -> None:
        load_reference(path)
        from_reference(TRAIN, path)

    write(torch_file(honest))
    read(None)
    fuzz(cases, write, read, names=" ")
