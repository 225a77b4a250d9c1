"""The lists of ``raymaml predict``: folders, files, CSVs, patterns, on disk and at URIs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from raymaml.classify.pictures import Picture, list_images, list_support, refuse_shared
from raymaml.common.errors import UserError
from raymaml.storage.place import Place, to_place


def draw(place: Place, colour: int = 0) -> None:
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        Image.new("L", (4, 4), colour).save(file, "PNG")


def quiet(_line: str) -> None:
    pass


def paths(pictures: list[Picture]) -> list[str]:
    return [picture.path for picture in pictures]


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Support set, pictures to predict, and files that are neither, on disk and at a URI."""
    place: Place = tmp_path
    if request.param == "memory":
        place = to_place(f"memory://{tmp_path.name}")
    for number, name in enumerate(("labelled/b/2.png", "labelled/a/1.png", "labelled/b/x/3.PNG")):
        draw(place / name, number)
    for name in ("new/2.png", "new/deep/er/1.jpg", "new/.hidden/4.png", "new/.5.png"):
        draw(place / name, 9)
    (place / "new" / "notes.txt").write_bytes(b"no picture")
    return place


def test_a_folder_is_searched_through(root: Place) -> None:
    found = list_images([str(root / "new")], quiet)
    assert paths(found) == [str(root / "new" / "2.png"), str(root / "new" / "deep/er/1.jpg")]
    assert [str(picture.place) for picture in found] == paths(found)


def test_a_folder_a_class(root: Place) -> None:
    support = list_support(str(root / "labelled"), quiet)
    names = {name: [Path(p.path).name for p in found] for name, found in support.items()}
    assert names == {"a": ["1.png"], "b": ["2.png", "3.PNG"]}


def test_files_and_patterns(root: Place) -> None:
    (one,) = list_images([str(root / "new" / "notes.txt")], quiet)  # named, so it is taken
    assert one.path.endswith("notes.txt")
    found = list_images([str(root / "new" / "*.png"), str(root / "labelled" / "*/?.png")], quiet)
    assert [picture.place.name for picture in found] == ["2.png", "1.png", "2.png"]
    deep = list_images([str(root / "labelled" / "**" / "*.png")], quiet)
    assert {picture.place.name for picture in deep} == {"1.png", "2.png"}
    assert found[0].place.read_bytes() == (root / "new" / "2.png").read_bytes()


def test_lists(root: Place) -> None:
    """Other columns are passed over, and paths are relative to the list."""
    table = root / "list.csv"
    table.write_bytes(
        b"Class;note;PATH\nx;1;labelled/a/1.png\ny;;new/2.png\n\nx;;new/deep/er/1.jpg"
    )
    assert paths(list_images([str(table)], quiet)) == [
        *("labelled/a/1.png", "new/2.png", "new/deep/er/1.jpg")
    ]
    support = list_support(str(table), quiet)
    assert {name: paths(found) for name, found in support.items()} == {
        "x": ["labelled/a/1.png", "new/deep/er/1.jpg"],
        "y": ["new/2.png"],
    }
    assert support["y"][0].place.read_bytes() == (root / "new" / "2.png").read_bytes()


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    lines: list[str] = []
    assert len(list_images([str(tmp_path)], lines.append)) == 1
    assert lines == [
        f"{tmp_path}: left out: 1 .txt files, which Pillow does not read, first notes.txt"
    ]


def test_names_that_are_no_text_can_be_written() -> None:
    assert Picture("a\udcff.png", Path("x")).name == "a\\udcff.png"


def test_the_same_content_is_found_under_another_name(tmp_path: Path) -> None:
    for name, colour in {"s/a/1": 1, "s/b/1": 2, "new/1": 3, "new/2": 2}.items():
        draw(tmp_path / f"{name}.png", colour)
    support = list_support(str(tmp_path / "s"), quiet)
    images = list_images([str(tmp_path / "new")], quiet)
    refuse_shared(support, images[:1])
    with pytest.raises(UserError) as caught:
        refuse_shared(support, images)
    assert caught.value.problems == (
        f"{tmp_path}/new/2.png: is a support image of class b ({tmp_path}/s/b/1.png); its class is"
        " given: take it out of --images",
    )
    draw(tmp_path / "s/b/2.png", 1)
    with pytest.raises(UserError, match=r"s/b/2.png: is in the classes a \(.*s/a/1.png\) and b"):
        refuse_shared(list_support(str(tmp_path / "s"), quiet), [])


def test_at_a_uri_the_address_counts() -> None:
    place = to_place("memory://shared/support/1.png")
    picture = Picture(str(place), place)
    with pytest.raises(UserError, match="is a support image of class a"):
        refuse_shared({"a": [picture]}, [picture])


def test_of_many_mistakes_the_first_ones_are_named(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path\n" + "".join(f"{number}.png\n" for number in range(12)))
    with pytest.raises(UserError) as caught:
        list_images([str(table)], quiet)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[0] == (
        f"{table}:2: {tmp_path}/0.png does not exist; mend the path"
    )
    assert caught.value.problems[-1] == "and 2 more mistakes of this kind"
