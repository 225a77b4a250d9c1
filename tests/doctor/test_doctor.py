"""The doctor without Ray: a config's places, the rehearsal, and the lines that it prints."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.doctor import Finding, attempt, failures
from raymaml.doctor.command import COPIES_REMEDY, config_findings, examine, show
from raymaml.doctor.rehearsal import MARKER, rehearsal_folder, rehearse
from raymaml.evaluation.campaign import Campaign, judge_locally
from raymaml.training.worker import train_locally

CLUSTER = ClusterConfig(device="cpu")
REHEARSAL = [f"rehearsal: {stage}" for stage in ("data", "train", "resume", "same result", "test")]


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_an_error_in_a_check_is_a_finding(caplog: pytest.LogCaptureFixture) -> None:
    def wrong() -> str:
        raise ValueError("not\nso")

    assert list(attempt({"a": lambda: "fine"})) == [Finding("ok", "a", "fine")]
    (finding,) = attempt({"a": wrong})
    assert (finding.status, finding.found) == ("fail", "ValueError: not so")
    assert "--verbose" in finding.remedy
    assert "Traceback" in caplog.text  # --verbose shows it
    (problem,) = failures("a", UserError("x: is 1; 2", remedy="use 3"))
    assert (problem.found, problem.remedy) == ("x: is 1; 2", "use 3")


def test_a_config_whose_places_are_well(make_config: Any) -> None:
    config = make_config("run")
    found = by_name(config_findings(config))
    assert list(found) == ["data", "copies", "run folder", "disk for run_dir"]
    assert found["data"].found.startswith("176 images, 24 train, 4 val, 10 test episodes")
    # convolutions of 3x3 from 1 and thrice from 4 channels to 4, biases, norms; a head of 4 to 3
    total = (9 * 4 + 4 + 8) + 3 * (9 * 4 * 4 + 4 + 8) + (4 * 3 + 3)
    about = f"{total} parameters, {total} adapt"
    assert found["run folder"].found == f"{config.run_folder}: is new; {about}"
    assert not config.run_dir.exists()
    train_locally(config, lambda _line: None)
    found = by_name(config_findings(config))
    assert found["run folder"].found == f"{config.run_folder}: is done; {about}"


def test_pictures_in_two_splits_are_a_warning(make_config: Any, tmp_path: Path) -> None:
    config: Config = make_config("run")
    old = by_name(config_findings(config))["copies"]
    assert old == Finding(
        "ok", "copies", "no picture is in two splits, found now: its import did not look"
    )
    leak = {"split": "test", "other": "train", "images": 40, "equal": 2, "near": 1}
    inside = leak | {"split": "train", "equal": 5}  # no leak
    found = {"overlaps": [each | {"examples": ["a = b"]} for each in (leak, inside)]}
    bank = tmp_path / "bank"
    shutil.copytree(config.data.bank, bank)
    header = json.loads((bank / "bank.json").read_text())
    (bank / "bank.json").write_text(json.dumps(header | {"duplicates": found}))
    data = config.data.model_copy(update={"bank": bank})
    findings = by_name(config_findings(config.model_copy(update={"data": data})))
    assert findings["copies"] == Finding(
        "warn",
        "copies",
        "3 of 40 test images are in train as well (2 equal, 1 nearly equal), such as a = b",
        COPIES_REMEDY,
    )
    assert findings["run folder"].status == "ok"  # the checks go on


def test_data_that_was_changed_and_a_run_of_another_config(make_config: Any) -> None:
    config: Config = make_config("run", "outer.num_steps=1")
    train_locally(config, lambda _line: None)
    inner = config.inner.model_copy(update={"lr": 0.5})
    finding = by_name(config_findings(config.model_copy(update={"inner": inner})))["run folder"]
    assert finding.status == "fail"
    assert "was started with inner.lr = 0.1, the config now says 0.5" in finding.found
    assert finding.remedy.startswith("give the old value")
    bank = config.run_dir / "bank"
    shutil.copytree(config.data.bank, bank)
    content = bytearray((bank / "images.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (bank / "images.arrow").write_bytes(content)
    shutil.rmtree(Path(str(config.data.shards)) / "val")
    for place, remedy in ((bank, "raymaml data import"), (config.data.bank, "raymaml data sample")):
        data = config.data.model_copy(update={"bank": place})
        found = by_name(config_findings(config.model_copy(update={"data": data})))
        assert found["data"].status == "fail"
        assert remedy in found["data"].remedy
        assert "run folder" not in found


@pytest.mark.parametrize(
    "base", ["a folder", pytest.param("a URI", marks=pytest.mark.slow), "no run_dir"]
)
def test_a_rehearsal_leaves_nothing(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    places = {"a folder": lambda: tmp_path / "new" / "runs", "no run_dir": lambda: None}
    run_dir = places.get(base, lambda: request.getfixturevalue("s3") / "runs")()
    with rehearsal_folder(run_dir) as folder:
        assert (folder / MARKER).exists()
        copies = Path(tempfile.gettempdir(), f"{folder.name}-cache")
        found = list(rehearse(folder, CLUSTER, train_locally, judge_locally))
        assert copies.is_dir() == (base == "a URI")
        assert (folder.parent == copies.parent) == (base == "no run_dir")
    assert [(each.what, each.status) for each in found] == [(name, "ok") for name in REHEARSAL]
    assert not folder.exists()
    assert not copies.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_ends_with_the_first_failure(tmp_path: Path) -> None:
    def interrupted(config: Config, echo: Callable[[str], None]) -> bool:
        return False

    def faster(config: Config, echo: Callable[[str], None]) -> bool:
        outer = config.outer.model_copy(update={"lr": 0.1})
        return train_locally(config.model_copy(update={"outer": outer}), echo)

    def no_memory(*_: object) -> Campaign:
        raise MemoryError("none left")

    cases: list[tuple[Any, Any, int, str]] = [
        (interrupted, judge_locally, 1, "it was interrupted"),
        (faster, judge_locally, 3, "from those of one process"),
        (train_locally, no_memory, 4, "MemoryError: none left"),
    ]
    for number, (train, judge, failing, text) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = list(rehearse(folder, CLUSTER, train, judge))
        assert [each.what for each in found] == REHEARSAL[: failing + 1]
        assert [each.status for each in found] == ["ok"] * failing + ["fail"]
        assert text in found[-1].found
        assert found[-1].remedy


def test_a_folder_that_cannot_be_made(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    config = make_config("run", f"run_dir={tmp_path / 'file'}")
    finding = by_name(examine(config, local=True))["rehearsal"]
    assert finding.status == "fail"
    assert "cannot be made a folder" in finding.found
    assert finding.remedy == "give another run_dir"


FINDINGS = [
    Finding("ok", "one", "is [so]"),
    Finding("warn", "the second", "is not\x1b", "do this"),
    Finding("fail", "three", "is " + "long " * 60, "do that"),
]


def test_a_line_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert show(iter(FINDINGS[:2]), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "ok    one                     is [so]",
        "warn  the second              is not\\x1b -> do this",
        "1 ok, 1 warn, 0 fail",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert not show(iter(FINDINGS), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("\x1b[1;31mfail\x1b[0m  three")


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", "--local", *map(str, arguments)])


def test_the_command(make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_config("run")
    path = tmp_path / "run" / "config.yaml"
    with caplog.at_level(logging.INFO, logger="raymaml"):
        well = doctor(path, "--json", "--verbose")
    assert well.exit_code == 0, well.output
    assert "PyTorch version: 2." in caplog.text
    found = {each["what"] for each in json.loads(well.stdout)["findings"]}
    assert found >= {"versions", "devices", "memory", "data", *REHEARSAL}
    broken = doctor(path, "data.bank=nowhere")
    assert broken.exit_code == 1
    (line,) = [line for line in broken.output.splitlines() if line.startswith("fail")]
    assert line.startswith("fail  data  ")
    assert "-> import one with `raymaml data import CONFIG`" in line
    assert doctor(path, "outer.lrr=1").exit_code == 2
