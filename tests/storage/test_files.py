"""Folders and files appear whole or not at all, on disk and at a URI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymaml.common.errors import UserError
from raymaml.storage.files import (
    make_folder,
    new_folder,
    remove_folder,
    replacing,
    write_text,
)
from raymaml.storage.place import Place, to_place
from raymaml.storage.temporary import remove_partial


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder that does not exist yet."""
    if request.param == "disk":
        return tmp_path / "place"
    found: Place = request.getfixturevalue("s3")
    return found / "place"


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 100)
    (folder / "marker.json").write_text("{}", encoding="utf-8")


def test_a_folder_appears_whole_stays_as_it_is_and_is_removed(place: Place) -> None:
    with new_folder(place, "marker.json") as folder:
        write(folder)
        assert not (place / "marker.json").exists()
    with pytest.raises(FileExistsError), new_folder(place, "marker.json") as folder:
        (folder / "marker.json").write_text("other", encoding="utf-8")
    assert sorted(path.name for path in place.iterdir()) == ["a.bin", "marker.json"]
    assert (place / "a.bin").read_bytes() == b"a" * 100
    assert (place / "marker.json").read_text() == "{}"
    remove_folder(place, "marker.json")
    remove_partial(place.parent)
    assert not place.exists()


def test_an_error_leaves_nothing(place: Place) -> None:
    with pytest.raises(FileNotFoundError), new_folder(place, "marker.json") as folder:
        write(folder / "missing")
    assert not place.exists()
    assert not list(place.parent.glob("*place*"))


def test_the_marker_is_written_last(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill in the middle leaves lacks the marker, whatever the order of the names."""
    place = s3 / "place"
    written: list[str] = []
    kind = type(place)
    opened = kind.open

    def watched(self: Place, mode: str) -> Any:
        written.append(self.name)
        return opened(self, mode)

    monkeypatch.setattr(kind, "open", watched)
    with new_folder(place, "marker.json") as folder:
        write(folder)
        (folder / "z.bin").write_bytes(b"z")
    assert written == ["a.bin", "z.bin", "marker.json"]


def test_text_is_replaced_as_a_whole(place: Place) -> None:
    write_text(place / "x.txt", "old")
    with pytest.raises(TypeError), replacing(place / "x.txt") as file:
        file.writelines([b"ne", None])  # type: ignore[list-item]
    assert (place / "x.txt").read_text() == "old"
    write_text(place / "x.txt", "new")
    assert (place / "x.txt").read_text() == "new"
    assert [path.name for path in place.iterdir()] == ["x.txt"]


def test_a_storage_that_does_not_answer_is_one_message(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = to_place("s3://other-bucket/runs")
    away.fs.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://other-bucket/runs: cannot be reached \("):
        make_folder(to_place("s3://other-bucket/runs"), "run_dir")
    away.fs.clear_instance_cache()
