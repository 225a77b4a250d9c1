"""The doctor without Ray: a config's places, the rehearsal, and what is shown."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.doctor import rehearsal
from raymaml.doctor.command import examine, show
from raymaml.doctor.data import config_findings, device_findings
from raymaml.doctor.finding import Finding, attempt, fail, in_units, ok, user_error, warn
from raymaml.doctor.rehearsal import MARKER, rehearsal_folder, rehearse
from raymaml.evaluation.campaign import judge_locally
from raymaml.storage.place import Place
from raymaml.training.worker import train_locally

CLUSTER = ClusterConfig(device="cpu")
REHEARSAL = [
    f"rehearsal: {stage}"
    for stage in ("import and sample", "train", "go on", "same result", "test")
]


def statuses(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.what: finding.status for finding in findings}


def test_what_a_check_raises_is_a_finding(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(error: Exception) -> Callable[[], str]:
        def check() -> str:
            raise error

        return check

    assert list(attempt("a", lambda: "fine")) == [ok("a", "fine")]
    (finding,) = attempt("a", wrong(ValueError("not\nso")))
    assert (finding.status, finding.found) == ("fail", "ValueError: not so")
    assert "--verbose" in finding.remedy
    assert "Traceback" in caplog.text  # which that shows
    assert user_error("a", "x: is 1; 2; use 3") == fail("a", "x: is 1; 2", "use 3")
    assert user_error("a", "no remedy").found == "no remedy"
    assert (in_units(3 << 29), in_units(5 << 20)) == ("1.5 GiB", "5 MiB")


def test_a_config_whose_places_are_well(make_config: Any) -> None:
    config = make_config("run")
    findings = list(config_findings(config))
    assert {finding.status for finding in findings} <= {"ok", "warn"}  # room on this disk
    told = {finding.what: finding.found for finding in findings}
    assert "176 images" in told["image bank"]
    assert "24 train, 4 val, 10 test" in told["episodes"]
    # convolutions of 3x3 from 1 and thrice from 4 channels to 4, biases, norms; a head of 4 to 3
    total = (9 * 4 + 4 + 8) + 3 * (9 * 4 * 4 + 4 + 8) + (4 * 3 + 3)
    assert told["model"] == f"convnet4 of {total} parameters, of which {total} adapt"
    assert told["run folder"] == f"{config.run_folder}: is new"
    assert not config.run_dir.exists()
    train_locally(config, lambda _line: None)
    told = {finding.what: finding.found for finding in config_findings(config)}
    assert told["run folder"].endswith("was started with this config, and is done")


def test_a_pixel_that_was_changed(make_config: Any, tmp_path: Path) -> None:
    config: Config = make_config("run")
    bank = Path(shutil.copytree(config.data.bank, tmp_path / "bank"))
    content = bytearray((bank / "images.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (bank / "images.arrow").write_bytes(content)
    data = config.data.model_copy(update={"bank": bank})
    found = list(config_findings(config.model_copy(update={"data": data})))
    (finding,) = [finding for finding in found if finding.what == "image bank"]
    assert finding.status == "fail"
    assert "raymaml data import" in finding.remedy


def test_episodes_that_are_missing_and_a_run_of_another_config(make_config: Any) -> None:
    config: Config = make_config("run", "outer.num_steps=1")
    train_locally(config, lambda _line: None)
    other = config.model_copy(update={"inner": config.inner.model_copy(update={"lr": 0.5})})
    found = {each.what: each for each in config_findings(other)}
    assert found["run folder"].status == "fail"
    assert "was started with inner.lr = 0.1, the config now says 0.5" in found["run folder"].found
    assert found["run folder"].remedy.startswith("give the old value")
    shutil.rmtree(Path(str(config.data.shards)) / "val")
    found = {each.what: each for each in config_findings(config)}
    assert found["episodes"].status == "fail"
    assert "raymaml data sample" in found["episodes"].remedy


def test_the_device_of_a_config(make_config: Any) -> None:
    assert statuses(device_findings(make_config("run"))) == {"cluster.device": "ok"}
    config = make_config("run", "cluster.precision=tf32")
    (finding,) = device_findings(config)
    assert (finding.status, finding.remedy) == ("fail", "use float32 or bf16")


def test_a_rehearsal(tmp_path: Path) -> None:
    with rehearsal_folder(tmp_path / "new" / "runs") as folder:
        assert (folder / MARKER).exists()
        found = statuses(rehearse(folder, CLUSTER, train_locally, judge_locally))
    assert found == dict.fromkeys(REHEARSAL, "ok")
    assert list(tmp_path.iterdir()) == []  # the folders that were made are gone as well


@pytest.mark.slow
def test_a_rehearsal_at_a_uri_leaves_no_copy(s3: Place) -> None:
    with rehearsal_folder(s3 / "runs") as folder:
        copies = Path(tempfile.gettempdir(), f"{folder.name}-cache")
        found = statuses(rehearse(folder, CLUSTER, train_locally, judge_locally))
        assert copies.is_dir()
    assert found == dict.fromkeys(REHEARSAL, "ok")
    assert not folder.exists()
    assert not copies.exists()


def test_a_folder_of_runs_that_was_there_stays(tmp_path: Path) -> None:
    with rehearsal_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
    assert tmp_path.exists()
    with rehearsal_folder(None) as folder:
        assert folder.parent == Path(tempfile.gettempdir())
    assert not folder.exists()


def test_a_rehearsal_ends_with_what_fails(tmp_path: Path) -> None:
    def interrupted(config: Config, echo: Callable[[str], None]) -> bool:
        return False

    def faster(config: Config, echo: Callable[[str], None]) -> bool:
        outer = config.outer.model_copy(update={"lr": 0.1})
        return train_locally(config.model_copy(update={"outer": outer}), echo)

    def no_memory(*_: object) -> Place:
        raise MemoryError("none left")

    cases: list[tuple[Any, Any, int, str]] = [
        (interrupted, judge_locally, 1, "it was interrupted"),
        (faster, judge_locally, 3, "from those of a lone process"),
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


def test_one_weight_that_differs_is_enough(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, alone = make_config("run", "name=one"), make_config("run", "name=other")
    weights = {"one": {"a": torch.zeros(2), "b": torch.zeros(2)}}
    weights["other"] = weights["one"] | {"b": torch.tensor([0.0, 0.25])}
    monkeypatch.setattr(rehearsal, "train_locally", lambda *_: True)
    monkeypatch.setattr(rehearsal, "_weights", lambda run: weights[run.name])
    with pytest.raises(UserError, match=r"up to 2\.5e-01 from those of a lone process"):
        rehearsal._compare(config, alone)
    assert "bit by bit" in rehearsal._compare(config, config)


def test_a_folder_that_cannot_be_made(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    config = make_config("run", f"run_dir={tmp_path / 'file'}")
    (finding,) = [each for each in examine(config, None) if each.what == "rehearsal"]
    assert finding.status == "fail"
    assert "cannot be made a folder" in finding.found
    assert finding.remedy == "give another run_dir"


FINDINGS = [
    ok("one", "is [so]"),
    warn("the second", "is not", "do this"),
    fail("three", "is " + "long " * 60, "do that"),
]


def test_a_line_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(iter(FINDINGS[:2]), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "ok    one         is [so]",
        "warn  the second  is not -> do this",
        "1 ok, 1 warn, 0 fail",
    ]
    assert not show(iter(FINDINGS), as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_on_a_terminal_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert not show(iter(FINDINGS), as_json=False)
    text = capsys.readouterr().out
    assert "is [so]" in text
    assert "\x1b[1;31mfail\x1b[0m" in text
    assert "do that" in text


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert not show(iter(FINDINGS), as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    assert content["findings"][1] == {
        "status": "warn",
        "what": "the second",
        "found": "is not",
        "remedy": "do this",
    }


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", "--local", *map(str, arguments)])


def test_the_command(make_config: Any, tmp_path: Path) -> None:
    make_config("run")
    path = tmp_path / "run" / "config.yaml"
    well = doctor(path, "--json")
    assert well.exit_code == 0, well.output
    found = {each["what"]: each["status"] for each in json.loads(well.output)["findings"]}
    assert found.keys() >= {"Python", "memory", "image bank", "cluster.device", *REHEARSAL}
    broken = doctor(path, "data.bank=nowhere")
    assert broken.exit_code == 1
    (line,) = [line for line in broken.output.splitlines() if line.startswith("fail")]
    assert line.startswith("fail  image bank  ")
    assert "-> import one with `raymaml data import CONFIG`" in line
    assert doctor(path, "outer.lrr=1").exit_code == 2
