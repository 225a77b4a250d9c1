"""Hostile configs, overrides, studies and sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from helpers_fuzz import Fuzz, changed_bytes, changed_tree, hostile_values
from hypothesis import strategies as st

from raymaml.common.errors import UserError
from raymaml.config.load import dump_config, load_config, load_study
from raymaml.experiments.journal import STATE_FILE, Journal
from raymaml.experiments.study_file import read_study
from raymaml.experiments.sweep import read_sweep
from raymaml.storage.place import to_place

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
TEXTS = [path.read_bytes() for path in PATHS]
TREES = [yaml.safe_load(text) for text in TEXTS]
STUDIES = [tree for tree in TREES if "checks" in tree]
SWEEPS = [tree for tree in TREES if "space" in tree]

TRICKS = [
    "a: &a [*a]",
    "a: &a {b: *a}",
    "x: &x [1]\n"
    + "".join(f"x{i}: &x{i} [*x{i - 1 or ''}, *x{i - 1 or ''}]\n" for i in range(1, 40)),
    "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
    "[" * 5000,
    "{a: " * 3000,
    "name: !!python/object/apply:os.system [touch ../outside/pwned]",
    "name: !!int x",
    "name: 2021-13-45",
    "name: 0x" + "f" * 6000,
    "name: " + "9" * 6000,
    "name: !!binary x",
    "name: !!omap [a: 1, a: 2]",
    "? [a, b]\n: 1",
    "1: 2\nnull: 3\ntrue: 4\n",
    "<<: {name: a}\n",
    "%YAML 9.9\n---\nname: a",
    'name: "\\ud800"',
    'name: "\\0"',
    "\ufeffname: a",
    "name: 190:20:30.15",
    "data: {source: {kind: [glyphs]}}",
    "name: =",
    "inner: {lr: 1e999, momentum: .nan}",
]


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "replace")


def documents(root: Path, trees: list[Any]) -> st.SearchStrategy[bytes]:
    tree = st.sampled_from(trees).flatmap(lambda one: changed_tree(one, hostile_values(root)))
    return st.one_of(
        tree.map(as_yaml),
        st.sampled_from(TEXTS).flatmap(changed_bytes),
        st.tuples(st.sampled_from(TEXTS), st.sampled_from(TRICKS)).map(
            lambda pair: pair[0] + b"\n" + pair[1].encode("utf-8", "surrogatepass")
        ),
        st.sampled_from(TRICKS).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )


def test_a_config(fuzz: Fuzz) -> None:
    path = fuzz.place / "config.yaml"

    def read(_: bytes) -> None:
        config = load_config(path)
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config

    fuzz(documents(fuzz.root, TREES), path.write_bytes, read, names="config.yaml")


def keys_of(tree: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += [f"{prefix}{key}", *keys_of(value, f"{prefix}{key}.")]
    return found


def test_overrides(fuzz: Fuzz) -> None:
    path = CONFIGS / "glyphs/quickstart.yaml"
    keys = sorted({key for tree in TREES for key in keys_of(tree)})
    values = hostile_values(fuzz.root).map(lambda value: as_yaml([value])[2:].decode())
    one = st.one_of(
        st.builds("{}={}".format, st.sampled_from(keys), values | st.sampled_from(TRICKS)),
        st.text(max_size=30),
        st.builds("{}.{}={}".format, st.sampled_from(keys), st.text(max_size=5), values),
    )
    fuzz(
        st.lists(one, min_size=1, max_size=4),
        lambda _: None,
        lambda overrides: load_config(path, overrides),
        names=" ",  # a place, a key and a sentence: the command line has no file
    )


def test_a_study(fuzz: Fuzz) -> None:
    path = fuzz.place / "study.yaml"

    def read(_: bytes) -> None:
        _, problems = load_study(path)
        if problems:
            raise UserError(*problems)
        read_study(path, (), CONFIGS / "glyphs/quickstart.yaml")

    fuzz(documents(fuzz.root, STUDIES), path.write_bytes, read, names="study")


def test_a_sweep(fuzz: Fuzz) -> None:
    path = fuzz.place / "sweep.yaml"

    def read(_: bytes) -> None:
        read_sweep(path, (), CONFIGS / "glyphs/quickstart.yaml")

    fuzz(documents(fuzz.root, SWEEPS), path.write_bytes, read, names="sweep")


def test_the_state_of_a_sweep(fuzz: Fuzz) -> None:
    identity = {"seed": 1, "space": {"outer.lr": {"uniform": [0, 1]}}}
    reports = [
        {"trial": trial, "step": 50 * step, "accuracy": 0.5, "ci95": 0.01, "goes_on": step < 2}
        for trial in range(2)
        for step in range(3)
    ]
    values = {str(trial): {"outer.lr": 0.5} for trial in range(2)}
    state = {"schema_version": 2, "identity": identity, "values": values, "reports": reports}
    tree = changed_tree(state, hostile_values(fuzz.root))
    cases = st.one_of(
        tree.map(lambda one: json.dumps(one).encode()),
        changed_bytes(json.dumps(state).encode()),
    )

    def read(_: bytes) -> None:
        journal = Journal(to_place(str(fuzz.place)), identity, lambda *_: True)
        assert all(report.trial >= 0 for report in journal.reports)

    fuzz(cases, (fuzz.place / STATE_FILE).write_bytes, read)
