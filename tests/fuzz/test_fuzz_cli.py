"""The commands themselves on hostile files: exit code 0 or 2, a message, no traceback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_fuzz import changed_bytes, changed_tree, hostile_values, inputs_of, make_root
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymaml.cli import main
from raymaml.config.schema import Config
from raymaml.evaluation.campaign import judge_locally
from raymaml.evaluation.run_test import plan_test
from raymaml.training.worker import train_locally

MakeConfig = Callable[..., Config]
FEWEST, FEW, MOST = 8, 60, 600

COMMANDS = {
    "config.yaml": ["data show --out sheet.png", "report"],
    "bank/bank.json": ["data show --out sheet.png", "data sample", "train --local"],
    "bank/images.arrow": ["data show --out sheet.png", "train --local"],
    "shards/train/manifest.json": ["data sample", "train --local"],
    "shards/test/manifest.json": ["report", "test --local"],
    "shards/train/shard-00000.arrow": ["train --local", "data sample"],
    "run.json": ["train --local"],
    "checkpoint.json": ["train --local", "report"],
    "params.safetensors": ["train --local", "report", "test --local"],
    "optimizer.pt": ["train --local"],
    "metrics.jsonl": ["report"],
    "parquet": ["report", "test --local --replay"],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--fuzz-inputs")
    tiers = [FEWEST, pytest.param(FEW, marks=pytest.mark.nightly)]
    metafunc.parametrize("inputs", tiers if wanted is None else [min(wanted, MOST)])


@pytest.fixture
def place(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A folder with config, a bank of its own, shards, and a run that is trained and tested."""
    folder = tmp_path / "place"
    config = make_config(folder, "outer.num_steps=2", "outer.validate_every=2")
    shutil.copytree(config.data.bank, folder / "bank")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(str(config.data.bank), str(folder / "bank")))
    train_locally(config, lambda _: None)
    judge_locally(lambda device: plan_test(config, device), config.cluster, lambda _: None)
    return folder


def files_of(place: Path) -> dict[str, Path]:
    """The file of each key of ``COMMANDS``."""
    everything = sorted(path for path in place.rglob("*") if path.is_file())
    run = place / "runs" / "tiny"
    return {
        key: next(
            path
            for path in everything
            if str(path).endswith(key)
            and (run in path.parents or "/" in key or key == "config.yaml")
        )
        for key in COMMANDS
    }


def sign(path: Path) -> None:
    """Make the file that holds the checksum of ``path`` fit."""
    data = path.read_bytes()
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    for name in ("manifest.json", "checkpoint.json", "bank.json"):
        card = path.parent / name
        if not card.exists() or card == path:
            continue
        tree = json.loads(card.read_bytes())
        for shard in tree.get("shards", []):
            shard.update(digest if shard["file"] == path.name else {})
        if path.name in tree.get("files", {}):
            tree["files"][path.name] = digest["sha256"]
        tree |= {"images_bytes": len(data)} if path.name == "images.arrow" else {}
        card.write_text(json.dumps(tree))


def test_commands(
    place: Path,
    tmp_path: Path,
    inputs: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "root").mkdir()
    root = make_root(tmp_path / "root")
    monkeypatch.chdir(root)
    files = files_of(place)
    honest = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    pairs = [(key, command) for key, commands in COMMANDS.items() for command in commands]
    values = hostile_values(root)

    def contents(key: str) -> st.SearchStrategy[bytes]:
        data = honest[files[key]]
        if not key.endswith(".json"):
            return changed_bytes(data)
        trees = changed_tree(json.loads(data), values).map(lambda tree: json.dumps(tree).encode())
        return trees | changed_bytes(data)

    cases = st.sampled_from(pairs).flatmap(
        lambda pair: st.tuples(st.just(pair), contents(pair[0]), st.booleans())
    )
    codes = []

    @settings(
        max_examples=inputs,
        **inputs_of(request),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: tuple[tuple[str, str], bytes, bool]) -> None:
        (key, command), data, is_signed = case
        files[key].write_bytes(data)
        if is_signed:
            sign(files[key])
        outcome = CliRunner().invoke(main, [*command.split(), str(place / "config.yaml")])
        assert outcome.exit_code in {0, 2}, (command, outcome.output[-2000:], outcome.exception)
        assert "Traceback" not in outcome.output
        assert outcome.exit_code == 0 or "raymaml: " in outcome.output
        codes.append(outcome.exit_code)
        for path, content in honest.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    run()
    assert codes.count(2) > 0
    assert (root / "outside" / "secret").read_text() == "irreplaceable"
    assert not (root / "outside" / "pwned").exists()
