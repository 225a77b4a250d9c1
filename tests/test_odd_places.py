"""Places that people give by mistake, or in short: through the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_data import write_class_folders

from raymaml.cli import main
from raymaml.config.load import load_config
from raymaml.config.study import StudyConfig

CONFIG = """name: x
data: {source: {kind: image-folder, path: ~/in}, bank: ~/bank, shards: ~/shards, image_size: 16}
episodes:
  train: &spec {num_ways: 2, num_shots: 1, num_queries: 1, num_episodes: 2}
  val: *spec
  test: *spec
outer: {num_steps: 1}
run_dir: ~/runs
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a config and images."""
    write_class_folders(tmp_path / "in")
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    """Run a command; its last line, or all that it says of a mistake."""
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output.strip() if code else result.output.strip().splitlines()[-1]


def test_the_home_folder(home: Path) -> None:
    run("data", "import", "~/config.yaml")
    run("data", "sample", "~/config.yaml", "data.shards=~/other")
    run("data", "show", "~/config.yaml", "--out=~/sheet.png")
    names = {path.name for path in home.glob("[!.]*")}  # matplotlib makes folders that are hidden
    assert names == {"config.yaml", "in", "bank", "other", "sheet.png"}
    assert not (home / "in" / "~").exists()


def test_every_key_of_a_path_knows_the_home_folder(home: Path) -> None:
    config = load_config("~/config.yaml", ["data.source.csv=~/list.csv"])
    source = config.data.source.model_dump()
    places = (config.data.bank, config.data.shards, config.run_dir, source["path"], source["csv"])
    names = ("bank", "shards", "runs", "in", "list.csv")
    assert places == tuple(home / name for name in names)
    assert StudyConfig.model_fields["config"].metadata  # as those of sources


def test_a_home_that_nobody_has() -> None:
    said = run("data", "import", "~/config.yaml", "data.bank=~nobody-here/bank", code=2)
    assert "data.bank is '~nobody-here/bank'" in said
    assert "begins with the home of a user that this machine does not know" in said


@pytest.mark.parametrize("key", ["data.bank", "data.shards", "run_dir"])
@pytest.mark.parametrize("command", ["data import", "data sample", "train", "test", "report"])
def test_memory_is_lost_with_the_command(command: str, key: str) -> None:
    said = run(*command.split(), "~/config.yaml", f"{key}=memory://b/x", code=2)
    assert said == (
        f"raymaml: {key} is memory://b/x: what is there is lost when the command ends; give a"
        " folder, or the URI of a storage"
    )


def test_a_bank_at_a_link_that_leads_nowhere(home: Path) -> None:
    (home / "bank").symlink_to(home / "disk" / "bank")
    said = run("data", "import", "~/config.yaml", code=2)
    assert said == (
        f"raymaml: {home}/bank: is a link to {home}/disk/bank, which does not exist; make that,"
        " remove the link, or give another path"
    )
    assert "is a link" in run("data", "import", "~/config.yaml", "data.bank=~/bank/", code=2)


def test_a_bank_at_a_link_to_itself(home: Path) -> None:
    (home / "bank").symlink_to(home / "bank")
    assert "is a link to" in run("data", "import", "~/config.yaml", code=2)


@pytest.mark.parametrize("length", [200, 240, 255])
def test_long_names(home: Path, length: int) -> None:
    name = "é" + "x" * (length - 2)  # bytes
    run("data", "import", "~/config.yaml", f"data.bank=~/{name}")
    run("data", "sample", "~/config.yaml", f"data.bank=~/{name}", f"data.shards=~/s{name[2:]}")
    names = {path.name for path in home.iterdir()}
    assert names == {"config.yaml", "in", name, f"s{name[2:]}"}


def test_names_that_are_too_long(home: Path) -> None:
    name = "x" * 256
    said = run("data", "import", "~/config.yaml", f"data.bank=~/{name}", code=2)
    assert "(File name too long); give a shorter name" in said
    run("data", "import", "~/config.yaml")
    run("data", "sample", "~/config.yaml")
    for arguments in (
        ("data", "sample", f"data.shards=~/{name}"),
        ("data", "sample", f"data.bank=~/{name}"),
        ("data", "show", f"--out=~/{name}"),
        ("train", f"run_dir=~/{name}", "--local"),
    ):
        head = arguments[: 2 if arguments[0] == "data" else 1]
        said = run(*head, "~/config.yaml", *arguments[len(head) :], code=2)
        assert "File name too long" in said, arguments
    assert {path.name for path in home.glob("[!.]*")} == {"config.yaml", "in", "bank", "shards"}


def test_places_below_a_file(home: Path) -> None:
    (home / "file").write_text("x")
    said = run("data", "import", "~/config.yaml", "data.bank=~/file/bank", code=2)
    assert "(Not a directory); a file stands where a folder should be" in said
    said = run("data", "import", "~/config.yaml", "data.source.path=~/file/in", code=2)
    assert "is not a folder; give one that exists" in said
    run("data", "import", "~/config.yaml")
    run("data", "sample", "~/config.yaml")
    for arguments in (
        ("data", "sample", "data.shards=~/file/shards"),
        ("data", "sample", "data.bank=~/file/bank"),
        ("data", "show", "--out=~/file/sheet.png"),
        ("train", "run_dir=~/file/runs", "--local"),
    ):
        head = arguments[: 2 if arguments[0] == "data" else 1]
        said = run(*head, "~/config.yaml", *arguments[len(head) :], code=2)
        assert "a file stands where" in said or "(Not a directory)" in said, said
