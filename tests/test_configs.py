"""Each shipped config, through the commands, on a few small images in the place of its data set.

The forms that data sets are distributed in are those of ``tests/data/importers``.
"""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from raymaml.cli import main
from raymaml.config.load import load_config, load_study, load_sweep
from raymaml.config.schema import SPLITS, Config
from raymaml.training.checkpoint import find_checkpoint, read_card

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
STUDIES = [name for name in ALL if name.startswith("studies/")]
SWEEPS = [name for name in ALL if name.startswith("sweeps/")]
SHIPPED = [name for name in ALL if name not in {*STUDIES, *SWEEPS}]
SIZE = 32


def small_source(config: Config, folder: Path) -> list[str]:
    """Glyphs are drawn, but only the characters of most fonts; others are `<split>/<class>/`."""
    each = 1 + max(config.episodes.of(split).num_shots for split in SPLITS)
    if config.data.source.kind == "glyphs":
        return ["data.source.min_fonts=16", f"data.source.images_per_class={max(each, 20)}"]
    generator = np.random.default_rng(0)
    for split in SPLITS:
        for label in range(config.episodes.of(split).num_ways):
            place = folder / split / f"{split}{label}"
            place.mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    mode = "gray" if config.data.source.kind == "omniglot" else "rgb"
    return [f"data.source={{kind: image-folder, path: {folder}, mode: {mode}}}"]


def small_overrides(config: Config, folder: Path) -> list[str]:
    """Two outer steps of one episode, ten inner steps at most, one test chunk, one query, small
    images and resnets."""
    overrides = [
        *small_source(config, folder / "images"),
        *(f"episodes.{split}.num_queries=1" for split in SPLITS),
        *("episodes.train.num_episodes=2", "episodes.val.num_episodes=2"),
        *("episodes.test.num_episodes=2", "evaluation.baseline_episodes=1"),
        *("outer.num_steps=2", "outer.meta_batch_size=1", "outer.log_every=1"),
        *(f"data.bank={folder}/bank", f"data.shards={folder}/shards", f"run_dir={folder}/runs"),
        f"data.image_size={min(config.data.image_size, SIZE)}",
    ]
    for key, inner in (("inner", config.inner), ("evaluation.inner", config.evaluation.inner)):
        if (inner.num_steps or 0) > 10:
            overrides.append(f"{key}.num_steps=10")
    if config.outer.schedule == "step":
        overrides.append("outer.milestones=[1]")
    if config.outer.warmup_steps:
        overrides.append("outer.warmup_steps=1")
    if config.pretrain:
        overrides += ["pretrain.num_steps=1", "pretrain.batch_size=4", "pretrain.slice_size=2"]
    if config.model.encoder.startswith("resnet"):
        overrides.append("model.width=[4,8,8,8]")
    return overrides


def run(*arguments: object) -> list[str]:
    outcome = CliRunner().invoke(main, list(map(str, arguments)))
    assert outcome.exit_code == 0, outcome.output
    return outcome.output.splitlines()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_opens_with_its_claim_and_its_command(name: str) -> None:
    assert (len(SHIPPED), len(STUDIES), len(SWEEPS)) == (31, 8, 1)
    lines = (CONFIGS / name).read_text("utf-8").splitlines()
    head = list(takewhile(lambda line: line.startswith("#"), lines))
    config = load_config(CONFIGS / name)
    size = config.data.image_size
    shape = rf"{config.episodes.test.num_ways}-way {config.episodes.test.num_shots}-shot"
    assert shape in head[0]
    assert f"{size}x{size}" in head[0]
    assert any(word in "\n".join(head) for word in ("Claim:", "Measured:", "place to start"))
    commands = [line for line in head if line.startswith("#   ")]
    assert any(f"configs/{name}" in line or "quickstart.sh" in line for line in commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_imports_samples_trains_and_tests(name: str, tmp_path: Path) -> None:
    path = CONFIGS / name
    overrides = small_overrides(load_config(path), tmp_path)
    config = load_config(path, overrides)
    pretrain = ["pretrain --local"] if config.pretrain else []
    for command in ("data import", "data sample", *pretrain, "train --local", "test --local"):
        run(*command.split(), path, *overrides)
    assert read_card(find_checkpoint(config.run_folder, "last")).step == 2
    summary = json.loads((config.run_folder / "test" / "summary.json").read_text("utf-8"))
    assert summary["arms"]["model"]["num_episodes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_trains_judges_and_ends_in_verdicts(name: str, tmp_path: Path) -> None:
    path = CONFIGS / name
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("# Claim (")
    assert f"#   raymaml study configs/{name}" in lines
    settings, _ = load_study(path)
    overrides = small_overrides(load_config(path.parent / settings.config), tmp_path)
    # a number of outer steps that a model has of its own wins over the overrides
    text = re.sub(r"outer.num_steps: \d+", "outer.num_steps: 2", "\n".join(lines))
    text = re.sub(r"config: .*", f"config: {(path.parent / settings.config).resolve()}", text)
    small = tmp_path / "study.yaml"
    small.write_text(text, encoding="utf-8")
    arguments = ["study", small, *overrides, "inner.num_steps=1", "--local"]
    *_, last = run(*arguments)
    summary = json.loads(Path(last).read_text("utf-8"))
    crossed = settings.crossed_arms()
    arms = [each.name for arm in crossed for each in settings.trainings_of(arm).values()]
    assert list(summary["arms"]) == arms
    assert all(arm["num_episodes"] == 2 for arm in summary["arms"].values())
    assert [each["claim"] for each in summary["verdicts"]] == [c.claim for c in settings.checks]
    assert all("refusal" not in each for each in summary["comparisons"])
    assert run(*arguments) == [last]  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_runs_its_trials_and_exports_the_best(name: str, tmp_path: Path) -> None:
    path = CONFIGS / name
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("# Claim: ")
    assert f"#   raymaml sweep configs/{name}" in lines
    settings = load_sweep(path)
    overrides = small_overrides(load_config(path.parent / settings.config), tmp_path)
    # as many validations as the sweep has, each after one outer step
    text = re.sub(r"grace_steps: \d+", "grace_steps: 1", path.read_text("utf-8"))
    text = re.sub(r"config: .*", f"config: {(path.parent / settings.config).resolve()}", text)
    text = re.sub(r"set: .*", "set: {outer.validate_every: 1}", text)
    small = tmp_path / "sweep.yaml"
    small.write_text(text, encoding="utf-8")
    content = json.loads(Path(run("sweep", small, *overrides, "--local")[-1]).read_text("utf-8"))
    assert len(content["trials"]) == settings.count
    assert {trial["status"] for trial in content["trials"]} <= {"done", "stopped"}
    best = tmp_path / f"runs/sweeps/glyphs-5way-1shot/{settings.name}/best/config.yaml"
    run("test", best, "--local")
