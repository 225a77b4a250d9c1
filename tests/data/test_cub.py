"""CUB-200-2011 on a small release of its layout, unpacked and as an archive."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers_data import LISTS
from helpers_imports import classes, import_source, pack, plan_source, problems_of, unpack
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS
from raymaml.data.importers.cub import split_of

WIDTH, HEIGHT = 60, 40
BOX = (10, 5, 20, 30)  # left, top, width, height


def jpeg() -> bytes:
    """Black, but for the white box and a grey left margin of 5 pixels."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "black")
    image.paste("gray", (0, 0, 5, HEIGHT))
    left, top, width, height = BOX
    image.paste("white", (left, top, left + width, top + height))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=100, subsampling=0)
    return stream.getvalue()


def release(numbers: list[int], each: int = 2) -> dict[str, bytes]:
    """The files of a release of these classes, below CUB_200_2011."""
    names = [f"{n:03d}.Bird_{n}/Bird_{n}_{i:04d}.jpg" for n in numbers for i in range(each)]
    lines = [f"{i} {name}" for i, name in enumerate(names, 1)]
    box = " ".join(f"{value}.0" for value in BOX)
    boxes = [f"{i} {box}" for i in range(1, len(names) + 1)]
    files = {f"images/{name}": jpeg() for name in names}
    files["images.txt"] = ("\n".join(lines) + "\n").encode()
    files["bounding_boxes.txt"] = ("\n".join(boxes) + "\n").encode()
    return {f"CUB_200_2011/{name}": content for name, content in files.items()}


SOME = {"size": 20, "split": "cub_100_50_50", "verify_counts": False}
plan = partial(plan_source, "cub", **SOME)


@pytest.mark.parametrize("split", ["cub_100_50_50", "cub_140_30_30"])
def test_the_splits_are_the_published_ones(split: str) -> None:
    own = {s: [n for n in range(1, 201) if split_of(n, split) == s] for s in SPLITS}
    sizes = [int(size) for size in split.split("_")[1:]]
    assert [len(own[s]) for s in SPLITS] == sizes
    path = LISTS / f"{split}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    lists = json.loads(path.read_text())
    assert own == {s: sorted(int(name[:3]) for name in lists[s]) for s in SPLITS}


@pytest.mark.parametrize("where", ["folder", "folder above", "archive", "archive above"])
def test_a_release_is_read_wherever_it_lies(tmp_path: Path, where: str) -> None:
    files = release([1, 2, 4, 8])
    if "archive" in where:
        path = pack(tmp_path / "CUB_200_2011.tgz", files)
    else:
        path = unpack(tmp_path, files) / "CUB_200_2011"
    found = plan(tmp_path if "above" in where else path)
    assert classes(found) == [
        ("train", "001.Bird_1", 2),
        ("val", "002.Bird_2", 2),
        ("test", "004.Bird_4", 2),
        ("test", "008.Bird_8", 2),
    ]
    images = found.classes[0].load()
    assert images.shape == (2, 20, 20, 3)
    # the middle square is x = 10..50 of 60, halved: the box is x = 0..10, y = 2..17
    assert images[0, 4:15, 1:8].min() > 240
    assert images[0, :, 12:].max() < 15
    assert "split cub_100_50_50, middle squares" in found.source


def test_the_other_split_by_name(tmp_path: Path) -> None:
    unpack(tmp_path, release([1, 2, 44, 8]))
    found = plan(tmp_path, split="cub_140_30_30")
    assert [c.split for c in found.classes] == ["train", "train", "val", "test"]
    assert "split cub_140_30_30" in found.source


def test_birds_are_cut_out_by_their_boxes(tmp_path: Path) -> None:
    unpack(tmp_path, release([1, 2, 4]))
    found = plan(tmp_path, crop_to_box=True)
    assert found.classes[0].load()[0, 1:-1, 1:-1].min() > 235  # nothing but the white box
    assert "cut out by bounding box" in found.source


def test_a_box_is_cut_at_the_images_border(tmp_path: Path) -> None:
    files = release([1, 2, 4], each=1)
    files["CUB_200_2011/bounding_boxes.txt"] = b"1 50 30 99 99\n2 0 0 5 40\n3 10 5 20 30\n"
    unpack(tmp_path, files)
    first, second, _ = (planned.load() for planned in plan(tmp_path, crop_to_box=True).classes)
    assert first.max() < 15  # black all over
    assert np.abs(second[0, :, :15].astype(int) - 128).max() < 20  # the grey margin


def test_counts_are_verified(tmp_path: Path) -> None:
    unpack(tmp_path, release([1, 2, 4]))
    problems = problems_of(plan, tmp_path, verify_counts=True)
    assert len(problems) == 4
    assert "images.txt: lists 6 images, CUB-200-2011 has 11,788" in problems[0]
    assert "split train has 1 classes, CUB 100/50/50 has 100" in problems[1]
    # 11,788 = 188 * 59 + 12 * 58
    full = [f"{n:03d}.Bird/{i}.jpg" for n in range(1, 201) for i in range(59 - (n > 188))]
    lines = "\n".join(f"{i} {name}" for i, name in enumerate(full, 1))
    (tmp_path / "CUB_200_2011" / "images.txt").write_text(lines)
    assert len(plan(tmp_path, verify_counts=True).classes) == 200
    assert len(plan(tmp_path, verify_counts=True, split="cub_140_30_30").classes) == 200


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "holds no images.txt of CUB-200-2011" in problems_of(plan, tmp_path)[0]
    root = unpack(tmp_path, release([1, 2, 4], each=1)) / "CUB_200_2011"
    (root / "images/002.Bird_2/Bird_2_0000.jpg").unlink()
    (root / "images/004.Bird_4/Bird_4_0000.jpg").write_bytes(b"no image")
    _, second, third = plan(tmp_path).classes
    with pytest.raises(UserError, match=r"holds no images/002\.Bird_2/Bird_2_0000\.jpg"):
        second.load()
    with pytest.raises(UserError, match=r"Bird_4_0000\.jpg: is not a readable image"):
        third.load()
    (root / "bounding_boxes.txt").write_text("1 1 1 1 1\n")
    boxes = problems_of(plan, tmp_path, crop_to_box=True)
    assert len(boxes) == 2
    assert "bounding_boxes.txt: has no box of 002.Bird_2/Bird_2_0000.jpg" in boxes[0]
    (root / "bounding_boxes.txt").write_text("1 1 1 x 1\n")
    assert "could not convert" in problems_of(plan, tmp_path, crop_to_box=True)[0]
    (root / "images.txt").write_text("1 001.Bird_1/a.jpg\n2\n3 201.X/a.jpg\n4 ../../secret\n")
    assert "images.txt:2: must hold 2 values" in problems_of(plan, tmp_path)[0]
    (root / "images.txt").write_text("1 001.Bird_1/a.jpg\n3 201.X/a.jpg\n4 ../../secret\n")
    assert [problem.split(" is of no class")[0] for problem in problems_of(plan, tmp_path)] == [
        f"{root}/images.txt: {name}" for name in ("../../secret", "201.X/a.jpg")
    ]


def test_files_outside_the_release_are_not_read(tmp_path: Path) -> None:
    unpack(tmp_path, release([1, 2, 4], each=1))
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "CUB_200_2011" / "images.txt").write_text("1 001.Bird_1/../../../secret.jpg\n")
    with pytest.raises(UserError, match=r"holds no images/001\.Bird_1/\.\./\.\./\.\./secret"):
        plan(tmp_path).classes[0].load()


def test_an_import_leaves_nothing_that_it_unpacks(tmp_path: Path) -> None:
    path = pack(tmp_path / "CUB_200_2011.tgz", release([1, 3, 2, 6, 4, 8], each=3))
    bank = import_source("cub", path, tmp_path, images=3, **SOME | {"size": 16})
    assert bank.num_images == 18
    assert bank.image_shape == (3, 16, 16)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["CUB_200_2011.tgz", "bank"]
