"""The Omniglot source, on archives of its layout that the tests build, and on the real ones."""

from __future__ import annotations

import io
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SHARED
from helpers_imports import import_source, plan_source, problems_of, unpack, zipped
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.data.importers import omniglot
from raymaml.data.importers.plan import ImportPlan

plan = partial(plan_source, "omniglot", size=28, split="background_evaluation")
upright = partial(plan, rotations=False)
OFFICIAL = SHARED / "data"


def png(*ink: tuple[int, int]) -> bytes:
    """A 1-bit 105x105 drawing: paper is 1, each (x, y) is a block of 15x15 ink."""
    image = Image.new("1", (105, 105), 1)
    for x, y in ink:
        image.paste(0, (15 * x, 15 * y, 15 * x + 15, 15 * y + 15))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def layout(characters: dict[str, int], drawings: dict[str, bytes]) -> dict[str, bytes]:
    """The official members of alphabets ("<set>/<Alphabet>" -> number of characters)."""
    return {
        f"{alphabet}/character{number:02d}/{name}": content
        for alphabet, count in characters.items()
        for number in range(1, count + 1)
        for name, content in drawings.items()
    }


def background(*names: str, count: int = 2) -> dict[str, int]:
    return {f"images_background/{name}": count for name in names}


DRAWINGS = {"0001_02.png": png((1, 1)), "0001_01.png": png((0, 0), (3, 0))}
SIX = background("Aa", "Bb", "Cc", "Dd", "Ee", "Ff")
EVALUATION = {"images_evaluation/Zz": 3}


def write_zips(folder: Path) -> None:
    (folder / "omniglot_images_background.zip").write_bytes(zipped(layout(SIX, DRAWINGS)))
    (folder / "images_evaluation.zip").write_bytes(zipped(layout(EVALUATION, DRAWINGS)))


def names(found: ImportPlan, split: str) -> list[str]:
    return [planned.name for planned in found.classes if planned.split == split]


def test_the_vinyals_split_divides_all_characters() -> None:
    splits = omniglot._vinyals_splits()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [1028, 172, 423]
    everything = [character for characters in splits.values() for character in characters]
    assert len(set(everything)) == 1623
    sets = Counter(character.split("/")[0] for character in everything)
    assert sets == {"images_background": 964, "images_evaluation": 659}
    assert len({character.rsplit("/", 1)[0] for character in everything}) == 50
    gurmukhi = [[c for c in splits[s] if "Gurmukhi" in c] for s in ("train", "val", "test")]
    assert [len(characters) for characters in gurmukhi] == [41, 0, 4]


def test_background_evaluation_takes_val_from_the_last_background_alphabets(
    tmp_path: Path,
) -> None:
    write_zips(tmp_path)
    found = upright(tmp_path)
    assert names(found, "train") == ["Aa/character01", "Aa/character02"]
    assert {name.split("/")[0] for name in names(found, "val")} == {"Bb", "Cc", "Dd", "Ee", "Ff"}
    assert names(found, "test") == ["Zz/character01", "Zz/character02", "Zz/character03"]


@pytest.mark.parametrize("where", ["zips", "folders", "folders of folders"])
def test_strokes_are_white_and_rotations_are_classes(tmp_path: Path, where: str) -> None:
    if where == "zips":
        write_zips(tmp_path)
    else:
        folder = tmp_path / ("deep" if "of" in where else "")
        unpack(folder, layout(SIX, DRAWINGS) | layout(EVALUATION, DRAWINGS))
    four = plan(tmp_path, size=7).classes[:4]
    suffixes = ("", "/rot090", "/rot180", "/rot270")
    assert [planned.name for planned in four] == [f"Aa/character01{suffix}" for suffix in suffixes]
    first, *turned = (planned.load() for planned in four)
    assert first.shape == (2, 7, 7, 1)
    # at 7x7 one block of ink is one pixel, softened by the filter; drawings are sorted by name
    ink = first[..., 0] > 128
    assert np.argwhere(ink[0]).tolist() == [[0, 0], [0, 3]]
    assert np.argwhere(ink[1]).tolist() == [[1, 1]]
    for turns, images in enumerate(turned, 1):
        np.testing.assert_array_equal(images, np.rot90(first, turns, axes=(1, 2)))
    assert turned[0][0, 6, 0, 0] > 128  # counter-clockwise: top left goes to bottom left


def test_resizing_is_lanczos_of_the_grey_image(tmp_path: Path) -> None:
    write_zips(tmp_path)
    image = upright(tmp_path).classes[0].load()[0, ..., 0]
    with Image.open(io.BytesIO(DRAWINGS["0001_01.png"])) as drawing:
        grey = drawing.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(image, 255 - np.asarray(grey))
    assert len(np.unique(image)) > 2  # not nearest neighbour


def test_each_broken_drawing_is_named_once_and_nothing_remains(tmp_path: Path) -> None:
    members = layout(SIX, DRAWINGS)
    broken = [name for name in members if "character02/0001_01" in name][:2]
    members |= {broken[0]: b"not a png", broken[1]: png((1, 1))[:60]}
    (tmp_path / "a.zip").write_bytes(zipped(members))
    (tmp_path / "b.zip").write_bytes(zipped(layout(EVALUATION, DRAWINGS)))
    run = partial(import_source, "omniglot", tmp_path, tmp_path, split="background_evaluation")
    for name, problem in zip(broken, problems_of(run), strict=True):
        assert f"{name}: is not a readable image" in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]
    (tmp_path / "a.zip").write_bytes(zipped(layout(SIX, DRAWINGS)))
    bank = run()
    assert bank.num_images == 4 * (6 * 2 + 3) * 2
    assert "Lake" in bank.source
    assert "MIT" in bank.licence


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source\.path: .*nowhere is not a folder"):
        plan(tmp_path / "nowhere")
    (tmp_path / "a.zip").write_bytes(zipped(layout(SIX, DRAWINGS)))
    with pytest.raises(UserError, match=r"no images_evaluation\.zip.*github"):
        plan(tmp_path)
    write_zips(tmp_path)
    problems = plan(tmp_path, split="vinyals").problems
    assert len(problems) == 1623
    assert "images_background/Alphabet_of_the_Magi/character01 of split train" in str(problems[0])


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    write_zips(tmp_path)
    archive = tmp_path / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"images_evaluation\.zip: is not a whole zip"):
        plan(tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "images_background/../../evil", "C:/evil", "a\\..\\evil"]
)
def test_archives_with_escaping_paths_are_refused(tmp_path: Path, name: str) -> None:
    write_zips(tmp_path)
    (tmp_path / "evil.zip").write_bytes(zipped({name: b""}))
    with pytest.raises(UserError, match=r"evil\.zip: holds the unsafe path"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("split", "counts"),
    [("vinyals", [1028, 172, 423]), ("background_evaluation", [964, None, 659])],
)
def test_the_official_archives(split: str, counts: list[int | None]) -> None:
    for name in ("omniglot_images_background.zip", "omniglot_images_evaluation.zip"):
        if not (OFFICIAL / name).exists():
            pytest.skip(f"{OFFICIAL / name} is not there")
    # other archives may lie beside these two
    found = upright(OFFICIAL, split=split)
    assert found.problems == ()
    sizes: list[int | None] = [len(names(found, s)) for s in ("train", "val", "test")]
    if split == "background_evaluation":
        sizes = [len(names(found, "train")) + len(names(found, "val")), None, sizes[2]]
    assert sizes == counts
    assert {planned.count for planned in found.classes} == {20}
    for planned in found.classes[::400]:
        images = planned.load()
        assert images.shape == (20, 28, 28, 1)
        assert 0 < images.mean() < 64  # mostly paper, which is black
