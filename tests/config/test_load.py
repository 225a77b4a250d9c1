"""YAML and overrides: precedence, numbers, and every mistake at once with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import dump_config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALLEST = """\
name: a
data: {source: {kind: glyphs}, bank: bank, shards: shards}
episodes:
  train: {num_episodes: 1}
  val: {num_episodes: 1}
  test: {num_episodes: 1}
outer:
  num_steps: 5
"""


def write(tmp_path: Path, text: str = SMALLEST) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_overrides_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "  lr: 0.5\n")
    assert load_config(path).outer.num_steps == 5
    assert load_config(path).outer.lr == 0.5
    assert load_config(path).outer.meta_batch_size == 4
    changed = load_config(path, ["outer.lr=0.25", "outer.num_steps=7", "inner.num_steps=1"])
    assert (changed.outer.lr, changed.outer.num_steps, changed.inner.num_steps) == (0.25, 7, 1)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".001", "1.0e-3", "0.001"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    # YAML 1.1 reads 1e-3 as text
    assert load_config(write(tmp_path), [f"outer.lr={text}"]).outer.lr == 0.001
    assert load_config(write(tmp_path, SMALLEST + f"  lr: {text}\n")).outer.lr == 0.001


def test_null_and_sections_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "  clip_value: 10\n")
    assert load_config(path).outer.clip_value == 10
    assert load_config(path, ["outer.clip_value=null"]).outer.clip_value is None
    assert load_config(path, ["model={width: 8, head: zero}"]).model.width == 8


def test_a_config_survives_dump_and_load(tmp_path: Path) -> None:
    overrides = ["outer.lr=1e-7", "seed=9223372036854775807", "inner.head_lr=0", "inner.lr=0.1"]
    config = load_config(write(tmp_path), overrides)
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_key_given_twice_is_an_error_with_both_places(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "  lr: 1\n  lr: 2\n")
    (problem,) = problems_of(path)
    assert problem == f"{path}:10: outer.lr is given twice (first at {path}:9); keep one"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("outer.num_step=3", "outer.num_step is unknown; did you mean num_steps?"),
        ("iner.lr=3", "iner is unknown; did you mean inner?"),
        ("data.source.min_font=3", "data.source.min_font is unknown; did you mean min_fonts?"),
        (
            "cluster.zzz=3",
            "cluster.zzz is unknown; allowed here: device, episodes_per_chunk, grace_seconds,"
            " keep_freed_memory, max_failures, memory_format, min_workers, num_workers, precision,"
            " threads_per_worker, timeout, wait_seconds",
        ),
    ],
)
def test_an_unknown_key_gets_a_suggestion(tmp_path: Path, override: str, hint: str) -> None:
    assert problems_of(write(tmp_path), override) == (f"command line: {hint}",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outer.lr=-1", "outer.lr is -1; it should be greater than 0"),
        ("outer={num_steps: 5, lr: -1}", "outer.lr is -1; it should be greater than 0"),
        ("outer.momentum=0.9", "outer.momentum is 0.9 but outer.optimizer is adam"),
        ("outer.milestones=[1]", "outer.milestones is [1] but outer.schedule is constant"),
        ("outer.warmup_steps=5", "outer.warmup_steps is 5; it must be below outer.num_steps, 5"),
        ("outer.num_steps=1", "outer.warmup_steps is 2; it must be below outer.num_steps, 1"),
        ("episodes.test.num_ways=4", "episodes.*.num_ways are "),
        ("episodes.test={num_episodes: 1, num_ways: 4}", "episodes.*.num_ways are "),
        ("cluster.min_workers=3", "cluster.min_workers is 3 but cluster.num_workers, the most, is"),
        ("data.source.kind=imagenet", "data.source.kind is 'imagenet'; it should be one of"),
        ("data.source.kind=cifar-fs", "data.source.path is missing; it has no default"),
        ("data.source={}", "data.source.kind is missing; it has no default"),
        ("model.encoder=convnet", "model.encoder is 'convnet'; it must be one of"),
        ("model.encoder_args={a: 1}", "model.encoder_args belong to your own encoder"),
    ],
)
def test_a_mistake_of_an_override_names_the_command_line(
    tmp_path: Path, override: str, message: str
) -> None:
    text = SMALLEST + "  lr: 0.1\n  warmup_steps: 2\nmodel: {norm: context}\n"
    path = write(tmp_path, text + "cluster: {num_workers: 2}\n")
    assert load_config(path).outer.lr == 0.1
    (problem,) = problems_of(path, override)
    assert problem.startswith(f"command line: {message}")


@pytest.mark.parametrize("override", ["outer.lr=0.1", "seed=3", "outer.log_every=1"])
def test_a_mistake_of_the_file_names_the_file_whatever_is_overridden(
    tmp_path: Path, override: str
) -> None:
    path = write(tmp_path, SMALLEST + "  momentum: 0.9\n")
    (problem,) = problems_of(path, override)
    assert problem.startswith(f"{path}:7: outer.momentum is 0.9 but outer.optimizer is adam")
    path = write(tmp_path, SMALLEST + "  lr: -1\n")
    if override != "outer.lr=0.1":
        assert problems_of(path, override)[0].startswith(f"{path}:9: outer.lr is -1;")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=0.1", "lr is unknown; did you mean inner.lr or outer.lr or evaluation.inner.lr?"),
        ("norm=context", "norm is unknown; did you mean model.norm?"),
        ("outer.num_ways=5", "outer.num_ways is unknown; did you mean episodes.train.num_ways or"),
        ("model.frozen=[a]", "model.frozen is unknown; did you mean inner.frozen or"),
        ("lr.outer=0.1", "lr is unknown; did you mean inner.lr or outer.lr or"),
        ("Outer.lr=0.1", "Outer is unknown; did you mean outer?"),
        ("outer.LR=0.1", "outer.LR is unknown; did you mean lr?"),
        ("meta_batch_size=4", "meta_batch_size is unknown; did you mean outer.meta_batch_size?"),
        ("image_size=28", "image_size is unknown; did you mean data.image_size?"),
    ],
)
def test_a_key_of_another_section_is_found(tmp_path: Path, override: str, hint: str) -> None:
    (problem,) = problems_of(write(tmp_path), override)
    assert problem.startswith(f"command line: {hint}")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST.replace("  num_steps: 5", "  lrr: 5"))
    overrides = ["inner.lr=fast", "model.norm=batch", "seed"]
    found = problems_of(path, *overrides)
    for key in ("seed: is not an override", "outer.num_steps is missing", "outer.lrr is unknown"):
        assert sum(key in problem for problem in found) == 1
    for key in ("inner.lr is 'fast'", "model.norm is 'batch'"):
        assert sum(key in problem for problem in found) == 1
    assert len(found) == 5


def test_a_number_of_workers_is_a_number_or_auto(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path), "cluster.num_workers=all")
    assert any("cluster.num_workers is 'all'" in problem for problem in found)
    assert any("'auto'" in problem for problem in found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_what_is_no_config_is_refused_with_its_path(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert reason in problem


def test_a_long_override_is_told_by_its_beginning(tmp_path: Path) -> None:
    path = write(tmp_path)
    for long in ("inner=" + "{a: " * 9000, "x" * 9000):
        (problem,) = problems_of(path, long)
        assert problem.startswith(long[:100])
        assert len(problem) < 300


def test_every_shipped_config_has_its_own_name_and_relative_folders() -> None:
    others = {"studies", "sweeps"}
    paths = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in others)
    assert len(paths) >= 2
    for path in paths:
        config = load_config(path)
        # paths in a shipped config are relative to where one runs it
        assert not config.data.bank.is_absolute()
    assert len({load_config(path).name for path in paths}) == len(paths)
