"""What an import holds in memory: a part of a class, and of a picture its pixels about twice."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import png
from helpers_imports import import_source, plan_source, problems_of
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.data.importers import images, plan

run = partial(import_source, "image-folder", images=3)


def pixels(number: int, size: int) -> np.ndarray:
    """Numbers that look random and are the same for ever."""
    values = np.arange(size * size * 3, dtype=np.int64) * (number + 3) // 7 % 251
    return values.reshape(size, size, 3).astype(np.uint8)


def write(folder: Path, counts: dict[str, list[int]], size: int) -> None:
    for split, numbers in counts.items():
        for number, count in enumerate(numbers):
            own = folder / split / f"{split}{number}"
            own.mkdir(parents=True)
            for image in range(count):
                array = pixels(image + 10 * number, size)
                Image.fromarray(array).save(own / f"{image:03}.png", compress_level=1)


COUNTS = {"train": [5, 23], "val": [4, 9], "test": [3, 3]}
HASH = "945598d807471a46a211e5873f026fcca033b025159436f052dc8312e3f07a36"
"""Of this bank, as it was written when classes were held whole."""


@pytest.mark.parametrize("part", [1, 5 * 19 * 19 * 3, 16 << 20])
def test_parts_make_the_same_bank(
    tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", COUNTS, 19)
    whole = run(tmp_path / "in", tmp_path / "whole", 19)
    monkeypatch.setattr(plan, "PART_BYTES", part)  # of one image, of five, of all
    bank = run(tmp_path / "in", tmp_path, 19)
    assert bank.hash == whole.hash == HASH
    bank.verify()
    for name in ("images.arrow", "bank.json"):
        assert (bank.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert (bank.class_images(1)[22] == pixels(32, 19)).all()


def test_memory_does_not_grow_with_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 128
    image = size * size * 3
    monkeypatch.setattr(plan, "PART_BYTES", 4 * image)
    peaks = []
    for count in (20, 20, 120):  # the first fills caches
        folder = tmp_path / f"{len(peaks)}"
        write(folder / "in", {"train": [count, 3], "val": [3, 3], "test": [3, 3]}, size)
        tracemalloc.start()
        run(folder / "in", folder, size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # a hundred images more are 4.9 MB, of which nothing is held
    assert peaks[2] - peaks[1] < 4 * image
    # a part as a list, stacked, and as planes is 12 images; Python's own things are some more
    assert peaks[2] < 30 * image


def test_problems_of_all_parts_and_classes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", COUNTS, 19)
    monkeypatch.setattr(plan, "PART_BYTES", 1)
    broken = ["train/train1/003.png", "train/train1/017.png", "val/val0/000.png"]
    for name in broken:
        (tmp_path / "in" / name).write_bytes(b"x")
    problems = problems_of(run, tmp_path / "in", tmp_path, 19)
    assert [problem.partition(":")[0] for problem in problems] == [
        str(tmp_path / "in" / name) for name in broken
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Large pictures


SIDE = 4096
_CHILD = """
import json, sys
from pathlib import Path
from raymaml.config.data_sources import ImageFolderSource
from raymaml.data.importers.image_folder import plan_image_folder
small, large = (plan_image_folder(ImageFolderSource(kind="image-folder", path=path), 32).classes[0]
    for path in sys.argv[1:])
def most():  # getrusage would begin with what the parent held at most
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
small.load()
before = most()
pixels = large.load()
after = most()
print(json.dumps([(after - before) * 1024, pixels[0, 0, 0].tolist()]))
"""


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGBA", (10, 20, 30, 0), "png", [255, 255, 255]),
        ("CMYK", (0, 255, 0, 0), "tif", [255, 0, 255]),
        ("I;16", 0x0FFF, "png", [255, 255, 255]),
        ("F", 1.0, "tif", [255, 255, 255]),
        ("RGBA;16", (0x0FFF, 0x0800, 0x0010, 0), "png", [255, 255, 255]),
    ],
)
def test_a_picture_takes_twelve_bytes_a_pixel_at_most(
    tmp_path: Path, mode: str, colour: Any, suffix: str, expected: list[int]
) -> None:
    """It was up to 24: seven such pictures at once."""
    for name, side in (("small", 16), ("large", SIDE)):
        (tmp_path / name / "train" / "a").mkdir(parents=True)
        path = tmp_path / name / "train" / "a" / f"0.{suffix}"
        options = {"compress_level": 1} if suffix == "png" else {}
        if mode == "RGBA;16":  # Pillow writes none
            path.write_bytes(png(np.full((side, side, 4), colour, "u2"), 6))
        else:
            Image.new(mode, (side, side), colour).save(path, **options)
    script = [sys.executable, "-c", _CHILD, tmp_path / "small", tmp_path / "large"]
    result = subprocess.run(script, check=True, capture_output=True, text=True)
    held, pixel = json.loads(result.stdout)
    assert pixel == expected
    file = path.stat().st_size
    # and bands of 2**18 pixels, in up to 96 bytes
    assert held < 12 * SIDE * SIDE + file + 96 * (1 << 18)


def one(folder: Path, **changes: Any) -> Any:
    (planned,) = plan_source("image-folder", folder, **changes).classes
    return planned.load()[0]


def test_a_key_allows_pictures_of_more_than_89_megapixels(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("1", (9_500, 9_500), 1).save(path)  # 90.25 megapixels
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError) as error:
        one(tmp_path)
    assert str(error.value) == (
        f"{path}: is not a readable image (Image size (90250000 pixels) exceeds 89478485); scale"
        " it down, or raise data.source.max_megapixels"
    )
    assert (one(tmp_path, max_megapixels=91) == 255).all()
    assert before == Image.MAX_IMAGE_PIXELS
    for limit in (40, 90):  # at more than twice as many Pillow raises an error of another kind
        with pytest.raises(UserError, match=rf"90250000 pixels\) exceeds {limit}000000\)"):
            one(tmp_path, max_megapixels=limit)


def test_a_jpeg_of_more_is_decoded_at_a_part_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.jpg"
    Image.new("RGB", (160, 160), (200, 100, 50)).save(path, quality=95)
    monkeypatch.setattr(images, "PIXELS", 6400)
    sizes = []

    def see(image: Image.Image) -> np.ndarray:
        image.load()
        sizes.append(image.size)
        return np.asarray(image)[:1, :1]

    pixel = images.decode_files([path], see, most_pixels=30_000)
    # 25,600 pixels are 4 times 6,400; a step of 2 * sqrt(4) = 4
    assert sizes == [(40, 40)]
    assert np.abs(pixel[0, 0, 0].astype(int) - [200, 100, 50]).max() < 4
