"""Each whole number of a config has a stated maximum, or may be as large as it likes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.explain import models_in
from raymaml.config.load import load_config
from raymaml.config.schema import SPLITS, Config

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "glyphs" / "quickstart.yaml"
STEPS = ("num_steps", "log_every", "validate_every", "checkpoint_every", "keep_best")
FREE = {
    # they take memory and time only as the run goes on
    *("seed", "episodes.seed", "data.source.seed", "cluster.max_failures"),
    *(f"outer.{key}" for key in STEPS),
    *(f"pretrain.{key}" for key in STEPS),
    *("cluster.episodes_per_chunk", "evaluation.chunk_size", "evaluation.baseline_episodes"),
    # no more is kept than there is
    "inner.tape_memory",
    # the cluster must have as many
    *("cluster.num_workers", "cluster.min_workers"),
    # the bank must have as many
    *(f"episodes.{split}.num_ways" for split in SPLITS),
    *(f"episodes.{split}.num_shots" for split in SPLITS),
    *(f"episodes.{split}.num_queries" for split in SPLITS),
    # as many fonts must draw a character
    "data.source.min_fonts",
    # the run may end before
    "inner.multi_step_loss.num_outer_steps",
}


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key whose value may be a whole number."""
    for name, field in model.model_fields.items():
        if "int" in str(field.annotation) and not models_in(field.annotation):
            yield prefix + name
        for inner in models_in(field.annotation):
            yield from numbers(inner, f"{prefix}{name}.")


def problems_of(key: str, value: str) -> str:
    several = key.startswith("inner.multi_step_loss.")
    section = ["inner.multi_step_loss.num_outer_steps=20"] if several else []
    try:
        load_config(QUICKSTART, ["pretrain.num_steps=1", *section, f"{key}={value}"])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [10**9, 10**18])
def test_a_huge_number_is_refused_with_its_maximum_or_harmless(value: int) -> None:
    keys = set(numbers(Config))
    assert len(keys) >= 25
    assert keys >= FREE
    harmless = {key for key in keys if not problems_of(key, str(value))}
    assert harmless == FREE
    for key in ("outer.meta_batch_size", "inner.num_steps", "evaluation.inner.num_steps"):
        assert problems_of(key, str(value)) == (
            f"command line: {key} is {value}; it should be less than or equal to 100000"
        )
        assert not problems_of(key, "100000")
    for key in ("cluster.wait_seconds", "cluster.grace_seconds", "cluster.timeout"):
        assert "it should be less than or equal to 10000000" in problems_of(key, str(value))


def test_harmless_numbers_take_no_time(make_config: Any, tmp_path: Path) -> None:
    """All at once: a run of one step and its test end as ever."""
    make_config("huge")
    keys = ["outer.log_every", "outer.validate_every", "outer.checkpoint_every"]
    keys += ["cluster.max_failures", "cluster.episodes_per_chunk", "cluster.num_workers"]
    keys += ["evaluation.chunk_size", "evaluation.baseline_episodes", "seed"]
    huge = [f"{key}={10**18}" for key in keys]
    arguments = [str(tmp_path / "huge" / "config.yaml"), "outer.num_steps=1", *huge]
    assert CliRunner().invoke(main, ["train", "--local", *arguments]).exit_code == 0
    outcome = CliRunner().invoke(main, ["test", "--local", *arguments])
    assert outcome.output.splitlines()[-1].endswith("summary.json"), outcome.output
