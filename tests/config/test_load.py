"""YAML and overrides: precedence, numbers, and every mistake at once with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from raymaml.cli import main
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


SUGGESTIONS = {
    "outer.num_step=3": "outer.num_step is unknown; did you mean num_steps?",
    "iner.lr=3": "iner is unknown; did you mean inner?",
    "outer.LR=0.1": "outer.LR is unknown; did you mean lr?",
    "data.source.min_font=3": "data.source.min_font is unknown; did you mean min_fonts?",
    "lr=0.1": "lr is unknown; did you mean inner.lr or outer.lr or pretrain.lr or",
    "norm=context": "norm is unknown; did you mean model.norm?",
    "outer.num_ways=5": "outer.num_ways is unknown; did you mean episodes.train.num_ways or",
    "lr.outer=0.1": "lr is unknown; did you mean inner.lr or outer.lr or",
    "cluster.zzz=3": "cluster.zzz is unknown; allowed here: cuda_graphs, deterministic, device,",
}


@pytest.mark.parametrize("override", SUGGESTIONS)
def test_an_unknown_key_gets_a_suggestion(tmp_path: Path, override: str) -> None:
    (problem,) = problems_of(write(tmp_path), override)
    assert problem.startswith(f"command line: {SUGGESTIONS[override]}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outer.lr=-1", "outer.lr is -1; it should be greater than 0"),
        ("outer.momentum=0.9", "outer.momentum is 0.9 but outer.optimizer is adam"),
        ("outer.warmup_steps=5", "outer.warmup_steps is 5; it must be below outer.num_steps, 5"),
        ("outer.num_steps=1", "outer.warmup_steps is 2; it must be below outer.num_steps, 1"),
        ("episodes.test.num_ways=4", "episodes.*.num_ways are "),
        ("cluster.min_workers=3", "cluster.min_workers is 3 but cluster.num_workers, the most, is"),
        ("data.source.kind=imagenet", "data.source.kind is 'imagenet'; it should be one of"),
        ("data.source.kind=cifar-fs", "data.source.path is missing; it has no default"),
        (
            "inner={rule: adam, rule_args: {beta1:0.8}}",
            "inner.rule_args.beta1:0.8 lacks a space after the colon: write beta1: 0.8",
        ),
        ("data.source={}", "data.source.kind is missing; it has no default"),
        ("model.encoder=convnet", "model.encoder is 'convnet'; it must be one of"),
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
    (problem,) = problems_of(write(tmp_path), "cluster.num_workers=all")
    assert "cluster.num_workers is 'all'" in problem
    assert "'auto'" in problem


def test_a_long_override_is_named_by_its_beginning(tmp_path: Path) -> None:
    path = write(tmp_path)
    for long in ("inner=" + "{a: " * 9000, "x" * 9000):
        (problem,) = problems_of(path, long)
        assert problem.startswith(long[:100])
        assert len(problem) < 300


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory); give a config file"),
        (b"\xff\xfe\x00name", "is not UTF-8 text; give a YAML config file"),
        (b"name: [a\nseed: 1\n", "is not YAML: line 2"),
        (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"", "holds no mapping (it is empty); expected keys such as name, data, outer"),
        (b"- name\n", "holds no mapping (but a list); expected keys such as name"),
        (b"a\n", "holds no mapping (but one value); expected keys such as name"),
        (b'{"schema_version": 3, "arms": {}}', "is a file that raymaml writes, and a config is"),
        (b"dependencies: [x]\nchannels: [x]\n", "its keys are dependencies, channels; a config"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert says in problem


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == (
        f"{tmp_path}: cannot be read (Is a directory); give a file: the config of a run is"
        " config.yaml in the run's folder",
    )


KINDS = {
    "train": (CONFIGS / "glyphs/quickstart.yaml", "a config"),
    "study": (CONFIGS / "studies/tasknorm.yaml", "a study file"),
    "sweep": (CONFIGS / "sweeps/glyphs-asha.yaml", "a sweep file"),
}
COMMANDS = ["data import", "data sample", "data show", "train", "test", "report", "audit", "doctor"]


@pytest.mark.parametrize("command", [*COMMANDS, "bench", "study", "sweep"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_command_names_the_one_that_a_file_is_for(command: str, kind: str) -> None:
    needed = command if command in KINDS else "train"
    if kind == needed:
        return
    path, title = KINDS[kind]
    outcome = CliRunner().invoke(main, [*command.split(), str(path)])
    assert outcome.exit_code == 2
    start = f"raymaml: {path}: is {title}, and {KINDS[needed][1]} is needed here; use `raymaml "
    assert outcome.output.startswith(f"{start}{kind} {path}`")


@pytest.mark.parametrize("option", ["study", "sweep"])
def test_a_config_option_needs_a_config(option: str) -> None:
    arguments = [option, str(KINDS[option][0]), "--config", str(KINDS["study"][0])]
    outcome = CliRunner().invoke(main, arguments)
    assert "tasknorm.yaml: is a study file, and a config is needed here" in outcome.output
