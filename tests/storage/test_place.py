"""Places: which texts are paths and which are URIs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.storage.place import beside, is_remote, to_place


@pytest.mark.parametrize("text", ["runs", "/a/b", "a:b", "C:/x", "./s3/x", "file:///a/b"])
def test_text_without_a_scheme_is_a_path_and_so_is_a_file_uri(text: str) -> None:
    assert to_place(text) == Path(text.removeprefix("file://"))
    assert not is_remote(to_place(text))


def test_a_uri_keeps_its_text_and_survives_another_process() -> None:
    place = to_place("memory://bucket/runs")
    assert is_remote(place)
    assert str(place / "x") == "memory://bucket/runs/x"
    again = pickle.loads(pickle.dumps(place))
    assert again == place
    assert to_place(again) is again


@pytest.mark.parametrize("value", [3, None, "", "nosuch://x", "a\0b", ["x"]])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^should be a path"):
        to_place(value)


def test_the_config_names_key_value_and_remedy(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config(tiny, ["run_dir=nosuch://x/y", "data.bank=3"])
    assert "run_dir is 'nosuch://x/y'; it should be a path, or a URI" in str(error.value)
    assert "data.bank is 3; it should be a path, or a URI such as s3://" in str(error.value)


def test_a_config_with_uris_is_written_and_read_back(tiny: Path) -> None:
    config = load_config(tiny, ["run_dir=memory://b/runs", "data.bank=memory://b/bank"])
    assert str(config.run_folder) == "memory://b/runs/tiny"
    dump = config.model_dump(mode="json")
    assert dump["run_dir"] == "memory://b/runs"
    assert Config.model_validate(dump) == config


def test_a_package_that_is_not_installed_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"not installed; pip install raymaml\[gs\]"):
        load_config(tiny, ["run_dir=gs://bucket/runs"])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config file; nothing that it names exists."""
    path = tmp_path / "config.yaml"
    path.write_text(
        """name: tiny
data: {source: {kind: glyphs}, bank: bank, shards: shards}
episodes: {train: {num_episodes: 2}, val: {num_episodes: 2}, test: {num_episodes: 2}}
outer: {num_steps: 1}
""",
        encoding="utf-8",
    )
    return path


def test_a_name_in_a_file_is_one_beside_it() -> None:
    name = Path("../glyphs/study.yaml")
    assert beside(Path("configs/studies/a.yaml"), name) == Path(
        "configs/studies/../glyphs/study.yaml"
    )
    assert beside(Path("a.yaml"), Path("/x/b.yaml")) == Path("/x/b.yaml")
    remote = to_place("memory://bucket/configs/studies/a.yaml")
    assert beside(remote, name) == to_place("memory://bucket/configs/glyphs/study.yaml")
    assert beside(remote, Path("/x/b.yaml")) == Path("/x/b.yaml")
