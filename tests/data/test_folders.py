"""Picture collections as they lie about: taken, or named and counted; nothing is dropped unsaid."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from helpers_imports import classes, import_source, plan_source
from PIL import Image

from raymaml.common.errors import UserError

plan = partial(plan_source, "image-folder")


def save(folder: Path, *names: str) -> None:
    """Save PNG files, whatever their names: red, each with a dot at another place."""
    for number, path in enumerate(folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8), "red")
        image.putpixel((number % 8, 7 - number // 8), (9, 9, 9))
        image.save(path, format="PNG")


def test_what_is_left_out_is_named_and_counted(tmp_path: Path) -> None:
    own = tmp_path / "train" / "a"
    save(tmp_path, "train/a/0.jpg", "train/loose.png")
    for name in ("1.heic", "2.HEIC", "notes.txt", "nothing", ".hidden"):
        (own / name).write_text("x")
    (own / "3.png").symlink_to(tmp_path / "nowhere.png")
    (own / "4.png").symlink_to("4.png")  # to itself
    (own / "folder").symlink_to(tmp_path)
    (tmp_path / "README.md").write_text("x")
    found = plan(tmp_path)
    assert classes(found) == [("train", "a", 1)]
    assert found.classes[0].load()[0, 0, 0].tolist() == [255, 0, 0]  # a PNG, whatever its name
    assert found.problems == ()
    assert found.notes == (
        "left out: 2 .heic files, which Pillow does not read, first train/a/1.heic",
        "left out: 1 .md files, which Pillow does not read, first README.md",
        "left out: 1 .txt files, which Pillow does not read, first train/a/notes.txt",
        "left out: 1 files without a suffix, first train/a/nothing",
        "left out: 2 links that lead nowhere, first train/a/3.png",
        "left out: 1 links to folders, first train/a/folder",
        "left out: 1 pictures outside of any class folder, first train/loose.png",
    )


def test_pictures_in_deeper_folders_are_of_the_class_folder(tmp_path: Path) -> None:
    names = ("a/0.png", "a/day/1.png", "a/day/dawn/2.png", "a/.cache/3.png", "b/night/0.png")
    save(tmp_path / "train", *names)
    found = plan(tmp_path)
    assert classes(found) == [("train", "a", 3), ("train", "b", 1)]
    assert found.notes == ("taken: 3 pictures in deeper folders, first train/a/day/1.png",)


def test_a_class_of_other_files_alone_says_what_it_holds(tmp_path: Path) -> None:
    save(tmp_path, "train/a/0.png")
    (tmp_path / "train" / "phone").mkdir()
    (tmp_path / "train" / "phone" / "0.heic").write_text("x")
    (problem,) = plan(tmp_path).problems
    assert problem == (
        "class phone of split train: has no images that Pillow reads; add some or remove its folder"
        " (left out: 1 .heic files, which Pillow does not read, first train/phone/0.heic)"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("TRAIN", "VALID", "TEST"),
        ("Training", "validation", "testing"),
        ("train", "dev", "test"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "wrapped", "archive/dataset"])
def test_splits_by_other_names_and_in_a_wrapper(
    tmp_path: Path, names: tuple[str, str, str], wrapper: str
) -> None:
    for name in names:
        save(tmp_path / wrapper, f"{name}/c-{name}/0.png")
    if wrapper:
        (tmp_path / "__MACOSX" / "x").mkdir(parents=True)
        (tmp_path / "LICENSE.txt").write_text("x")
    splits = ("train", "val", "test")
    found = plan(tmp_path)
    assert classes(found) == [
        (split, f"c-{name}", 1) for split, name in zip(splits, names, strict=True)
    ]
    left = "left out: 1 .txt files, which Pillow does not read, first LICENSE.txt"
    assert found.notes == ((left,) if wrapper else ())


def test_files_beside_each_wrapper_are_named(tmp_path: Path) -> None:
    save(tmp_path, "0.png", "archive/0.png", "archive/dataset/0.png")
    save(tmp_path / "archive/dataset", "a/0.png", "b/0.png")
    found = plan(tmp_path)
    assert {planned.name for planned in found.classes} == {"a", "b"}
    assert found.notes == ("left out: 3 pictures outside of any class folder, first 0.png",)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    save(tmp_path, "dev/0.png", "valid/0.png", "cat/0.png", "dog/0.png")
    assert {planned.name for planned in plan(tmp_path).classes} == {"dev", "valid", "cat", "dog"}
    # but not train; as in vehicles, the other classes are no splits
    (tmp_path / "train").mkdir()
    assert plan(tmp_path).problems == (
        f"{tmp_path}: 2 of 5 folders are no splits, first cat; move them elsewhere or, if dev or"
        " train or valid is a class, rename its folder or list the images in data.source.csv",
        f"{tmp_path}: dev and valid are both split val; join them",
    )


def test_pictures_without_class_folders(tmp_path: Path) -> None:
    save(tmp_path, "0.png", "1.png")
    with pytest.raises(UserError, match=r"no images in class folders.*2 pictures outside of any"):
        plan(tmp_path)


# Lists


TABLE = "path,class,split\r\nbilder/é 0.png,Käfer,train\r\n"


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_lists_in_unicode(tmp_path: Path, code: str) -> None:
    save(tmp_path, "bilder/é 0.png")
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(code, b"")
    (tmp_path / "list.csv").write_bytes(mark + TABLE.encode(code))
    assert classes(plan(tmp_path, csv=tmp_path / "list.csv")) == [("train", "Käfer", 1)]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("latin-1", r"list\.csv:2: is not UTF-8 \(byte 0xe9\); save the list as UTF-8"),
        ("cp437", r"list\.csv:2: is not UTF-8 \(byte 0x82\); save the list as UTF-8"),
        ("utf-16-le", r"list\.csv:? ?(cannot|:\d: is not UTF-8).*save (it|the list) as UTF"),
    ],
)
def test_lists_in_other_codes_name_the_remedy(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "list.csv").write_bytes(TABLE.encode(code))
    with pytest.raises(UserError, match=says):
        plan(tmp_path, csv=tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("mark", "header", "word"),
    [
        (",", "path,class,split", "validation"),
        (";", "Path, Class, Split", "Valid"),
        ("\t", "path,class,split", "DEV"),
    ],
)
def test_lists_of_spreadsheets(tmp_path: Path, mark: str, header: str, word: str) -> None:
    save(tmp_path, "a/b/0.png")
    text = f"{header}\na\\b\\0.png,k,{word}\n".replace(",", mark)
    (tmp_path / "list.csv").write_text(text)
    assert classes(plan(tmp_path, csv=tmp_path / "list.csv")) == [("val", "k", 1)]


@pytest.mark.parametrize(
    "name", [r"C:\images\0.png", "C:/images/0.png", "/images/0.png", "~/0.png"]
)
def test_absolute_paths_in_a_list_name_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.csv").write_text(f"path,class,split\n{name},k,val\n")
    (problem,) = plan(tmp_path, csv=tmp_path / "list.csv").problems
    assert problem.endswith(f"is not relative; write the path as it is below {tmp_path}")


# Too few


def test_many_small_classes_are_one_message_a_split(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for number in range(30):
            names = (f"{split}{number:02}/{image}.png" for image in range(3 + number % 2))
            save(tmp_path / "in" / split, *names)
    (tmp_path / "in" / "train" / "train00" / "x.heic").write_text("x")
    told: list[str] = []
    run = partial(
        import_source, "image-folder", tmp_path / "in", tmp_path, ways=5, tell=told.append
    )
    with pytest.raises(UserError) as error:
        run(images=16)
    # classes have 3 or 4 images, all below 16; 3 images are 1 shot and 2 queries
    assert error.value.problems == tuple(
        f"split {split}: 30 of 30 classes have fewer images than num_shots + num_queries = 16 of"
        f" episodes.{split}; the fewest are 3, of class {split}00; add images, leave these classes"
        f" out, or set episodes.{split}.num_queries to 2"
        for split in ("train", "val", "test")
    )
    run(images=3)  # the number fits, and the import ends with the files that it left out
    assert told[0] == (
        "left out: 1 .heic files, which Pillow does not read, first train/train00/x.heic"
    )


def test_too_few_classes_dealt_by_shares_name_the_shares(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "in" / f"{number:02}", "0.png", "1.png")
    with pytest.raises(UserError) as error:
        import_source("image-folder", tmp_path / "in", tmp_path, ways=3)
    # 12 * (0.64, 0.8) = 7.68 and 9.6, rounded 8 and 10: val has 2
    assert [problem for problem in error.value.problems if "split val" in problem] == [
        "split val: has 2 classes, episodes.val.num_ways is 3; add classes or lower it, or give the"
        " split a larger share by data.source.fractions [0.64, 0.16, 0.2]"
    ]
