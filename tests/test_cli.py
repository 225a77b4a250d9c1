"""The commands end to end, in this process and without Ray: from images to a report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import raymaml
from raymaml.cli import main
from raymaml.config.schema import SPLITS, Config
from raymaml.data.bank import ImageBank
from raymaml.evaluation.campaign import Campaign
from raymaml.evaluation.record_files import read_records
from raymaml.evaluation.records import record_arrays
from raymaml.training import loop
from raymaml.training.checkpoint import list_steps

COMMANDS = ["data import", "data sample", "data show", "train", "test", "report"]


def raymaml_(*arguments: object, exit_code: int = 0) -> Result:
    outcome = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert outcome.exit_code == exit_code, (outcome.output, outcome.exception)
    return outcome


def draw_images(bank: ImageBank, folder: Path) -> None:
    """Write the tiny bank's images as <split>/<class>/<image>.png."""
    for class_id, entry in enumerate(bank.classes):
        place = folder / entry.split / entry.name
        place.mkdir(parents=True)
        for number, image in enumerate(bank.class_images(class_id)):
            Image.fromarray(image[:, :, 0].copy()).save(place / f"{number}.png")


def summary_of(outcome: Result) -> Any:
    return json.loads(Path(outcome.output.splitlines()[-1]).read_text("utf-8"))


@pytest.fixture
def trained(make_config: Any, tmp_path: Path) -> Callable[..., tuple[Config, Path]]:
    """``trained("key=value", ...)`` -> config and file of a run that has taken one step."""

    def train(*overrides: str) -> tuple[Config, Path]:
        config = make_config("trained", "outer.num_steps=1", *overrides)
        raymaml_("train", "--local", tmp_path / "trained" / "config.yaml")
        return config, tmp_path / "trained" / "config.yaml"

    return train


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    text = raymaml_(*command.split(), "--help").output
    assert text.startswith(f"Usage: main {command}")
    assert "CONFIG [KEY=VALUE]..." in text
    # the summary is a sentence of its own
    assert any(line.strip().endswith(".") for line in text.splitlines()[1:4])
    *groups, name = command.split()
    assert f"\n  {name} " in raymaml_(*groups, "--help").output


def test_version() -> None:
    assert raymaml.__version__ in raymaml_("--version").output


def test_the_module_runs_and_imports_nothing_heavy_for_help() -> None:
    code = (
        "import sys; from raymaml.cli import main; main(['--help'], standalone_mode=False);"
        " sys.exit(' '.join({'ray', 'matplotlib', 'pyarrow', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "Usage:" in done.stdout


def test_from_images_to_a_report(
    make_config: Any, tiny_bank: ImageBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # relative paths are relative to where one is
    config: Config = make_config("made", "data.bank=bank", "data.shards=shards", "run_dir=runs")
    shutil.rmtree("shards")  # sampled by the fixture
    draw_images(tiny_bank, config.data.source.path)  # type: ignore[union-attr]
    path = tmp_path / "made" / "config.yaml"

    *classes, line = raymaml_("data", "import", path).output.splitlines()
    assert [each.partition("-")[0] for each in classes] == [f"{s}: {s}" for s in SPLITS]
    assert line.startswith("bank: 176 images of image folder images, gray, cropped to squares, ")
    assert "classes 12 train / 5 val / 5 test, hash " in line
    imported = ImageBank.open(Path("bank"))
    assert imported.num_images == (12 + 5 + 5) * 8
    # PNGs of the right size come through unchanged; the bank sorts its classes by name
    first = [entry.name for entry in tiny_bank.classes].index(imported.classes[1].name)
    assert np.array_equal(imported.class_images(1), tiny_bank.class_images(first))
    assert raymaml_("data", "import", path).output.splitlines()[-1] == line  # the same bank again

    lines = raymaml_("data", "sample", path).output.splitlines()
    assert lines == [
        "shards/train: 24 episodes",
        "shards/val: 4 episodes",
        "shards/test: 10 episodes",
    ]

    assert raymaml_("data", "show", path).output == "sheet.png\n"
    raymaml_("data", "show", "--episode", 3, "--split", "val", "--out", "episode.png", path)
    with Image.open("sheet.png") as sheet, Image.open("episode.png") as episode:
        assert sheet.height > episode.height > 0  # rows of 8 + 5 + 5 classes, and of 3

    lines = raymaml_("train", "--local", path).output.splitlines()
    # the settings; the layers: 4 blocks of conv and norm, the head, a line above and one below;
    # then a line a step, three validations, the end
    assert len(lines) == 1 + 11 + 6 + 3 + 1
    assert lines[0].startswith("runs/tiny: 1 CPU worker(s) of 1 thread(s), ")
    # conv1 40 + 8, three of 148 + 8, the head 3 x 4 + 3
    assert lines[11].split() == ["in", "all", "531", "531", "adapt"]
    assert lines[-1].startswith("runs/tiny: done; best validation accuracy ")
    (again,) = raymaml_("train", "--local", path).output.splitlines()
    assert again == lines[-1]  # done is done

    lines = raymaml_("test", "--local", path).output.splitlines()
    assert lines[-1] == "runs/tiny/test/summary.json"
    assert lines[0] == (
        "runs/tiny/test: 1 CPU worker(s) of 1 thread(s), freed memory is kept, channels_last,"
        " float32; chunks of up to 4 episodes"
    )
    assert len(lines) == 1 + 3 + 2 + 2 + 2  # chunks of 4 of 10, 5 and 5 episodes
    check_summary(Path(lines[-1]))
    check_headline(lines[-2], Path(lines[-1]))
    before = Path(lines[-1]).read_bytes()

    # all is judged: nothing is judged again, and the report comes out the same
    assert raymaml_("test", "--local", path).output.splitlines() == lines[-2:]
    Path(lines[-1]).unlink()
    assert raymaml_("report", path).output.splitlines() == lines[-2:]
    assert Path(lines[-1]).read_bytes() == before


def check_headline(line: str, path: Path) -> None:
    """The number is the one that the report opens with, and the page is there."""
    summary, page = json.loads(path.read_text()), path.with_name("report.html")
    mean = summary["accuracy"]["mean"]
    assert line.startswith(f"{mean:.2%} +- ")
    assert line.endswith(f" | {summary['protocol']}; report: {page}")
    assert " accuracy on 10 test episodes" in line
    assert page.is_file()
    said = line.split(" (95% interval) | ", 1)[0].replace("+-", "\N{PLUS-MINUS SIGN}")
    assert f"**{said}**" in path.with_name("report.md").read_text(encoding="utf-8")


def check_summary(path: Path) -> None:
    summary = json.loads(path.read_text())
    assert summary["num_episodes"] == 10
    assert "3-way 1-shot" in summary["protocol"]
    assert "transductive" in summary["protocol"]
    assert set(summary["arms"]) == {"model", "untrained", "no-adaptation"}
    assert [summary["arms"][a]["num_episodes"] for a in summary["arms"]] == [10, 5, 5]
    assert [entry["step"] for entry in summary["accuracy_by_step"]] == [0, 1, 2]
    assert summary["accuracy_by_step"][-1]["mean"] == summary["accuracy"]["mean"]
    records = {
        arm: record_arrays(read_records(next((path.parent / arm).iterdir())))
        for arm in summary["arms"]
    }
    model = records["model"]
    assert model.episode.tolist() == list(range(10))
    assert summary["accuracy"]["mean"] == pytest.approx(model.accuracy.mean())
    # 6 queries an episode: every accuracy is a number of sixths
    assert np.allclose(model.accuracy * 6, np.round(model.accuracy * 6))
    # the accuracy after no inner step is where adaptation starts
    assert records["no-adaptation"].accuracy_by_step.shape == (5, 1)
    assert np.array_equal(records["no-adaptation"].accuracy, model.accuracy_by_step[:5, 0])
    page = (path.parent / "report.md").read_text()
    for picture in ("accuracy_distribution", "accuracy_by_step", "learning_curve"):
        assert f"{picture}.png" in page
        assert (path.parent / f"{picture}.png").stat().st_size > 1000


def test_fewer_queries_where_the_smallest_class_leaves_no_more(make_config: Any) -> None:
    # 8 images a class and 1 shot leave 7 queries, where 9 are asked for
    asked = [f"episodes.{split}.num_queries=9" for split in ("train", "test")]
    with pytest.raises(raymaml.UserError, match=r"set episodes\.train\.num_queries to 7"):
        make_config("fit", *asked)
    config = make_config("fit", *asked, "episodes.fit_queries=true")
    path = config.run_dir.parent / "config.yaml"
    train, val, test = raymaml_("data", "sample", path).output.splitlines()
    text = "episodes with 7 queries a class: the smallest class of {} leaves no more"
    assert train.endswith(text.format("train"))
    assert val.endswith("episodes")
    assert test.endswith(text.format("test"))
    (batch,) = raymaml.episodes(config, "train", batch_size=24)
    assert batch.query_y.shape == (24, 21)
    raymaml_("train", "--local", path, "outer.num_steps=1")
    headline, _ = raymaml_("test", "--local", path).output.splitlines()[-2:]
    assert "3-way 1-shot 7-query" in headline


def test_a_campaign_goes_on_where_it_was_cut_off(trained: Any) -> None:
    config, path = trained("evaluation.baseline_episodes=0")
    raymaml_("test", "--local", path)
    (folder,) = (config.run_folder / "test" / "model").iterdir()
    whole = read_records(folder).drop(["seconds"])
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == 3
    files[1].unlink()  # a kill before it was written
    files[2].write_bytes(files[2].read_bytes()[:-20])  # a disk that lost the end
    before = files[0].stat().st_mtime_ns
    lines = raymaml_("test", "--local", path).output.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == ["8/10", "10/10"]  # 4..7 and 8..9
    assert read_records(folder, 10).drop(["seconds"]).equals(whole)
    files[1].unlink()
    # another chunk size cuts the missing episodes differently: 4..6 and 7
    lines = raymaml_("test", "--local", path, "evaluation.chunk_size=3").output.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == ["9/10", "10/10"]
    assert read_records(folder, 10).drop(["seconds"]).equals(whole)
    assert files[0].stat().st_mtime_ns == before


def test_more_ways_at_test_than_in_training(trained: Any) -> None:
    _, path = trained("model.head=zero", "episodes.test.num_ways=5")
    assert "5-way" in summary_of(raymaml_("test", "--local", path))["protocol"]


@pytest.mark.parametrize("head", ["zero", "shared"])
def test_a_head_of_equal_rows_is_not_judged_without_adaptation(trained: Any, head: str) -> None:
    config, path = trained(f"model.head={head}")
    content = summary_of(raymaml_("test", "--local", path))
    assert list(content["arms"]) == ["model", "untrained"]
    assert [each["arm"] for each in content["comparisons"]] == ["untrained"]
    # equal logits are a tie, won by one class: 2 of 6 queries of any episode
    first = content["accuracy_by_step"][0]
    assert (first["mean"], first["std"]) == (pytest.approx(1 / 3), pytest.approx(0))
    page = (config.run_folder / "test" / "report.md").read_text(encoding="utf-8")
    assert "the accuracy is 33.33% by construction, and no arm shows it" in page


def test_a_model_that_does_not_adapt_is_not_judged_twice(trained: Any) -> None:
    config, path = trained("evaluation.inner.num_steps=0")
    assert list(summary_of(raymaml_("test", "--local", path))["arms"]) == ["model", "untrained"]
    page = (config.run_folder / "test" / "report.md").read_text(encoding="utf-8")
    assert "by construction" not in page


SAVED = "runs/tiny: stopped before outer step 4 of 6, and saved; run the same command to go on"
NO_END = (
    "raymaml: terminated: no step ended within cluster.grace_seconds, 0.05 s, of the signal;"
    " what is written is kept: run the same command to go on"
)


@pytest.mark.parametrize(
    ("number", "grace", "pause", "message"),
    [
        (signal.SIGINT, 20, 0, SAVED),
        (signal.SIGTERM, 20, 0, SAVED),
        (signal.SIGTERM, 0.05, 60, NO_END),  # the step does not end
    ],
)
def test_ctrl_c_and_sigterm_end_after_the_step_and_the_run_can_go_on(
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    number: int,
    grace: float,
    pause: int,
    message: str,
) -> None:
    config = make_config("stopped", f"cluster.grace_seconds={grace}")
    real_step = loop.meta_step

    def disturbed(state: Any, *rest: Any) -> Any:
        if state.step == 3:
            signal.raise_signal(number)
            threading.Event().wait(pause)
        return real_step(state, *rest)

    monkeypatch.setattr(loop, "meta_step", disturbed)
    command = ("train", "--local", config.run_dir.parent / "config.yaml")
    lines = raymaml_(*command, exit_code=128 + number).output.splitlines()
    assert lines[-1].endswith(message)
    assert list_steps(config.run_folder)[-1] == (3 if pause else 4)
    monkeypatch.undo()
    assert ": done; " in raymaml_(*command).output.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_chunks_that_are_judged_are_kept(
    trained: Any, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    config, path = trained()
    real = Campaign.judge

    def stopping(self: Campaign, chunk: Any) -> Any:
        if chunk.first:  # 0 to 3 are done, 4 to 7 are next
            signal.raise_signal(number)
        return real(self, chunk)

    monkeypatch.setattr(Campaign, "judge", stopping)
    output = raymaml_("test", "--local", path, exit_code=128 + number).output
    assert output.splitlines()[-1] == (
        f"raymaml: {word}; what is written is kept: run the same command to go on"
    )
    monkeypatch.undo()
    (records,) = (config.run_folder / "test" / "model").iterdir()
    (kept,) = records.glob("*.parquet")
    written = kept.stat().st_mtime_ns
    raymaml_("test", "--local", path)
    assert kept.stat().st_mtime_ns == written


def test_audits_are_in_the_next_report_of_the_same_inner_loop(trained: Any) -> None:
    _, path = trained()
    *lines, audits = raymaml_("audit", "--local", path).output.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "transduction",
        "queries",
        "labels",
        "support",
    ]
    assert json.loads(Path(audits).read_text("utf-8"))["audits"][0]["outcome"] == "measured"
    page = Path(audits).with_name("report.md")
    raymaml_("test", "--local", path, "evaluation.baseline_episodes=0")
    assert "## Audit: Does a prediction depend on the other queries?" in page.read_text("utf-8")
    raymaml_("test", "--local", path, "evaluation.baseline_episodes=0", "evaluation.inner.lr=0.2")
    assert "Audit" not in page.read_text("utf-8")  # another inner loop was audited


def test_a_replay_repeats_all_records(trained: Any) -> None:
    config, path = trained()
    raymaml_("test", "--local", path)
    lines = raymaml_("test", "--replay", path).output.splitlines()
    assert lines[-1] == f"{config.run_folder}: all 20 records repeated"
