"""Image folders, and what every import promises: all problems at once, nothing half-written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_imports import classes, counts, import_source, plan_source, save_halves
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank

plan = partial(plan_source, "image-folder")
COLOURS = {"train": "red", "val": "lime", "test": "blue"}


def save(path: Path, colour: str | int = "red", mode: str = "RGB", size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(path)
    return path


def mark(path: Path, number: int) -> None:
    """Draw a dot that no other number gives, so that no two pictures of a class are equal."""
    with Image.open(path) as image:
        image.putpixel((number % 8, 4 + number // 8), (9, 9, 9))
        image.save(path)


def write_splits(folder: Path, classes: int = 2, images: int = 3) -> None:
    for split, colour in COLOURS.items():
        for number in range(classes):
            for image in range(images):
                mark(save(folder / split / f"{split}{number}" / f"{image}.png", colour), image)


def run(folder: Path, ways: int = 2, **changes: Any) -> ImageBank:
    return import_source("image-folder", folder / "in", folder, ways=ways, images=3, **changes)


def test_folders_of_splits_and_classes_become_a_bank(tmp_path: Path) -> None:
    write_splits(tmp_path / "in")
    bank = run(tmp_path)
    assert [(c.name, c.split, c.count) for c in bank.classes] == [
        (f"{split}{number}", split, 3) for split in COLOURS for number in range(2)
    ]
    assert bank.image_shape == (3, 8, 8)
    assert bank.class_images(0)[0, 0, 0].tolist() == [255, 0, 0]
    assert bank.class_images(2)[0, 0, 0].tolist() == [0, 255, 0]


def test_class_folders_are_dealt_by_fractions_and_seed(tmp_path: Path) -> None:
    for number in range(25):
        save(tmp_path / f"class{number:02d}" / "0.png")
    first, again, other = (plan(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert classes(first) == classes(again) != classes(other)
    # 25 * (0.64, 0.16, 0.2) = 16, 4, 5
    assert counts(first) == [(16, 16), (4, 4), (5, 5)]
    # 25 * (0.5, 0.25, 0.25): the bounds 12.5 and 18.75 round to 12 and 19
    assert counts(plan(tmp_path, fractions=(2, 1, 1))) == [(12, 12), (7, 7), (6, 6)]


def test_a_csv_names_path_class_and_split(tmp_path: Path) -> None:
    lines = ["path,class,split"]
    for split, colour in COLOURS.items():
        for number in range(6):
            path = save(tmp_path / "in" / "all" / f"{split}{number}.png", colour)
            mark(path, number)
            lines.append(f"all/{path.name},{split} {number % 2},{split}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    bank = run(tmp_path, csv=tmp_path / "table.csv")
    assert [(c.name, c.count) for c in bank.classes[1:3]] == [("train 1", 3), ("val 0", 3)]
    assert bank.class_images(4)[0, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "suffix",
    [
        *("png", "JPG", "jpeg", "jfif", "jpe", "bmp", "gif", "webp", "avif", "tif", "TIFF", "ppm"),
        *("pgm", "pnm", "jp2", "tga", "pcx", "ico", "qoi", "sgi", "dds", "apng", "dib"),
    ],
)
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "train" / "a" / f"image.{suffix}", "red", size=16)
    assert np.abs(load_one(tmp_path, 8)[4, 4].astype(int) - [255, 0, 0]).max() < 5


def load_one(folder: Path, size: int, **changes: Any) -> np.ndarray:
    (planned,) = plan(folder, size, **changes).classes
    image: np.ndarray = planned.load()[0]
    return image


def test_the_middle_square_is_scaled_to_size(tmp_path: Path) -> None:
    save_halves(tmp_path / "train" / "a" / "0.png", 60, 20)
    # the middle is x = 20..40, white up to 30; the filter reaches a little beyond the cut
    pixels = load_one(tmp_path, 10)
    assert pixels[:, :4].min() > 230
    assert pixels[:, 6:].max() < 25
    assert (load_one(tmp_path, 20)[:, :10] == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the left goes to the top
    save_halves(tmp_path / "train" / "a" / "0.png", 8, 8, exif=exif)
    pixels = load_one(tmp_path, 8)
    assert pixels[:3].min() == 255
    assert pixels[5:].max() == 0


def test_grey_is_one_channel(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "0.png", "red")
    # ITU-R 601: 0.299 of red is 76
    assert (load_one(tmp_path, 8, mode="gray") == 76).all()
    assert load_one(tmp_path, 8, mode="gray").shape == (8, 8, 1)


def test_all_problems_are_one_message_and_nothing_remains(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_splits(source)
    broken = source / "train" / "train0" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    save(source / "val" / "val0" / "text.jpg").write_text("no image")
    (source / "train" / "empty").mkdir()
    save(source / "test" / "train1" / "0.png")
    save(source / "other" / "a" / "0.png")
    with pytest.raises(UserError) as caught:
        run(tmp_path, ways=3)
    message = "\n".join(caught.value.problems)
    for part in (
        f"{broken}: is not a readable image",
        f"{source}/val/val0/text.jpg: is not a readable image",
        "class empty of split train: has no images",
        "class train1: is in the splits test and train",
        f"{source}: 1 of 4 folders is no split, first other; move it elsewhere or, if",
        "split test: 1 of 3 classes has fewer images than num_shots + num_queries = 3",
        "split train: has 2 classes, episodes.train.num_ways is 3",
        "split val: has 2 classes",
    ):
        assert part in message
    assert len(caught.value.problems) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_all_problems_of_a_csv_are_named_by_line(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    table = tmp_path / "table.csv"
    table.write_text(
        "path,class,split\na.png,a,train\na.png,b,train\nb.png,a,val\na.png,a,other\na.png,a\n"
    )
    second, third, fourth, fifth = map(str, plan(tmp_path, csv=table).problems)
    assert second.startswith(f"{table}:3: a.png is listed twice")
    assert third.startswith(f"{table}:4: {tmp_path / 'b.png'} does not exist")
    assert fourth.startswith(f"{table}:5: split is 'other'")
    assert fifth.startswith(f"{table}:6: 'a.png,a' does not give path, class and split")


@pytest.mark.parametrize(
    ("path", "csv", "says"),
    [
        ("nowhere", None, r"data\.source\.path: .*nowhere is not a folder"),
        (".", None, "holds no images"),
        (".", "no.csv", r"data\.source\.csv: .*cannot be read"),
        (".", "empty.csv", r"empty\.csv:1: the header is nothing"),
        (".", "other.csv", r"other\.csv:1: the header is file,label"),
    ],
)
def test_a_source_that_is_not_there_is_refused(
    tmp_path: Path, path: str, csv: str | None, says: str
) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("file,label\n")
    with pytest.raises(UserError, match=says):
        plan(tmp_path / path, csv=csv and tmp_path / csv)


def test_a_long_list_of_broken_images_is_cut(tmp_path: Path) -> None:
    write_splits(tmp_path / "in", images=20)
    for path in (tmp_path / "in").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    # 3 splits of 2 classes of 20 images are 120 problems
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1] == "... and 70 more problems like these"
