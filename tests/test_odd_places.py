"""Places that people give by mistake, or in short: through the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_data import write_class_folders

from raymaml.cli import main
from raymaml.config.load import load_config

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


def test_a_home_that_nobody_has() -> None:
    said = run("data", "import", "~/config.yaml", "data.bank=~nobody-here/bank", code=2)
    assert "data.bank is '~nobody-here/bank'" in said
    assert "begins with the home of a user that this machine does not know" in said


@pytest.mark.parametrize(
    ("command", "key"),
    [("data import", "data.bank"), ("data sample", "data.shards"), ("train", "run_dir")],
)
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


@pytest.mark.parametrize("length", [200, 255])
def test_long_names(home: Path, length: int) -> None:
    name = "é" + "x" * (length - 2)  # bytes
    run("data", "import", "~/config.yaml", f"data.bank=~/{name}")
    run("data", "sample", "~/config.yaml", f"data.bank=~/{name}", f"data.shards=~/s{name[2:]}")
    assert {path.name for path in home.iterdir()} == {"config.yaml", "in", name, f"s{name[2:]}"}


@pytest.mark.parametrize(
    ("place", "reason", "remedy"),
    [
        ("x" * 256, "(File name too long)", "give a shorter name"),
        ("file/x", "(Not a directory)", "a file stands where a folder should be"),
    ],
)
def test_places_that_cannot_be(home: Path, place: str, reason: str, remedy: str) -> None:
    (home / "file").write_text("x")
    said = run("data", "import", "~/config.yaml", f"data.bank=~/{place}", code=2)
    assert f"{reason}; {remedy}" in said
    run("data", "import", "~/config.yaml")
    run("data", "sample", "~/config.yaml")
    for line in (
        f"data sample ~/config.yaml data.shards=~/{place}",
        f"data sample ~/config.yaml data.bank=~/{place}",
        f"data show ~/config.yaml --out=~/{place}",
        f"train ~/config.yaml --local run_dir=~/{place}",
    ):
        said = run(*line.split(), code=2)
        assert reason in said or remedy in said, said
    names = {path.name for path in home.glob("[!.]*")}
    assert names == {"config.yaml", "in", "bank", "shards", "file"}
