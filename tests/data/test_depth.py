"""Pictures of every mode, with exact values: what is in them decides the scale, not the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import png, tiff
from helpers_imports import plan_source
from PIL import Image

from raymaml.common.errors import UserError

SIZE = 8


def load(path: Path, mode: str = "gray") -> Any:
    """Import the one picture below ``path``, a square of ``SIZE``, and return its pixels."""
    (planned,) = plan_source("image-folder", path, SIZE, mode=mode).classes
    return planned.load()[0]


def place(folder: Path, name: str) -> Path:
    path = folder / "train" / "a" / name
    path.parent.mkdir(parents=True)
    return path


def halves(left: Any, right: Any, kind: str, channels: int = 0) -> np.ndarray:
    """A square whose left half is ``left``; edges bleed less than 3 pixels, so corners tell."""
    values = np.full((SIZE, SIZE, channels) if channels else (SIZE, SIZE), left, kind)
    values[:, SIZE // 2 :] = right
    return values


def grey(pixels: Any) -> list[int]:
    return [int(pixels[0, 0, 0]), int(pixels[0, -1, 0])]


@pytest.mark.parametrize(
    ("kind", "left", "right", "expected"),
    [
        # the largest value is 255 at most: eight bits, as they are
        ("u2", 9, 200, [9, 200]),
        ("i4", 9, 255, [9, 255]),
        # 1023 = 2**10 - 1: ten bits, two are dropped; 256 needs ten bits as well
        ("i4", 512, 1023, [128, 255]),
        ("u2", 4, 256, [1, 64]),
        # twelve bits: 4095 >> 4 = 255, 2048 >> 4 = 128
        ("u2", 2048, 4095, [128, 255]),
        ("i4", 2048, 4095, [128, 255]),
        # fourteen: 16383 >> 6 = 255
        ("u2", 8192, 16383, [128, 255]),
        ("u2", 0, 16384, [0, 64]),
        # sixteen: the high byte
        ("u2", 0x8040, 0xFFFF, [0x80, 255]),
        ("i4", 0x8040, 0xFFFF, [0x80, 255]),
        # twenty-four and thirty-two, without a sign in the file; 0x10000 needs more than sixteen
        ("i4", 0, 0x10000, [0, 1]),
        ("i4", 0x400000, 0xFFFFFF, [0x40, 255]),
        ("i4", 0x40000000, 0x7FFFFFFF, [0x40, 0x7F]),
        ("u4", 0x40000000, 0xFFFFFFFF, [0x40, 255]),
        # below zero: the sign counts, and zero is 128. -1000..1000 is within -2**11..2**11 - 1:
        # (1000 + 2048) >> 4 = 190, (-1000 + 2048) >> 4 = 65
        ("i2", -1000, 1000, [65, 190]),
        ("i4", -1000, 1000, [65, 190]),
        ("i2", -128, 127, [0, 255]),
        ("i2", -129, 0, [(512 - 129) >> 2, 128]),
        ("i2", -32768, 32767, [0, 255]),
        # floats: 0..1; 0.5 * 255 = 127.5, to the even number
        ("f4", 0.5, 1.0, [128, 255]),
        ("f4", 0.0, 0.2, [0, 51]),
        ("f4", 0.0, 1.02, [0, 255]),
        # -1..1: (-0.2 + 1) / 2 * 255 = 102
        ("f4", -0.2, 1.0, [102, 255]),
        # beyond: whole numbers
        ("f4", 9.4, 200.0, [9, 200]),
        ("f4", 2048.0, 4095.0, [128, 255]),
    ],
)
def test_one_value_a_pixel(
    tmp_path: Path, kind: str, left: float, right: float, expected: list[int]
) -> None:
    place(tmp_path, "0.tif").write_bytes(tiff(halves(left, right, kind)))
    assert grey(load(tmp_path)) == expected
    assert grey(load(tmp_path, "rgb")) == expected


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bit_colours_share_a_depth(tmp_path: Path, kind: str) -> None:
    values = halves([0x0FFF, 0x0800, 0x0010], [0, 0, 0], "u2", channels=3)
    data = png(values, 2) if kind == "png" else tiff(values)
    place(tmp_path, f"0.{kind}").write_bytes(data)
    # twelve bits: 0xFFF >> 4, 0x800 >> 4, 0x10 >> 4; the high bytes alone are 15, 8, 0
    assert load(tmp_path, "rgb")[0, 0].tolist() == [255, 128, 1]


def test_sixteen_bit_colours_with_opacity(tmp_path: Path) -> None:
    values = halves([0x0FFF, 0x0800, 0x0010, 0xFFFF], [0, 0, 0, 0], "u2", channels=4)
    place(tmp_path, "0.png").write_bytes(png(values, 6))
    pixels = load(tmp_path, "rgb")
    assert pixels[0, 0].tolist() == [255, 128, 1]
    assert pixels[0, -1].tolist() == [255, 255, 255]  # on white


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, "png", [255, 255, 255]),
        ("L", 9, "png", [9, 9, 9]),
        ("P", 0, "gif", [255, 0, 0]),
        ("LA", (9, 255), "png", [9, 9, 9]),
        ("LA", (9, 0), "png", [255, 255, 255]),
        ("RGB", (1, 2, 3), "png", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), "png", [1, 2, 3]),
        ("CMYK", (0, 255, 0, 0), "tif", [255, 0, 255]),
        ("LAB", (128, 128, 128), "tif", [119, 119, 119]),
    ],
)
def test_eight_bits_are_not_scaled(
    tmp_path: Path, mode: str, colour: Any, suffix: str, expected: list[int]
) -> None:
    image = Image.new(mode, (SIZE, SIZE), colour)
    if mode == "P":
        image.putpalette([255, 0, 0])
    image.save(place(tmp_path, f"0.{suffix}"))
    assert load(tmp_path, "rgb")[0, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("name", ["0.png", "0.tif"])
def test_two_pictures_of_a_depth_keep_their_relation(tmp_path: Path, name: str, mode: str) -> None:
    """Stretched between their own least and largest values, both would be white."""
    # both of twelve bits: 0xFA0 >> 4, 0x7D0 >> 4
    for value, expected in ((0xFA0, 0xFA), (0x7D0, 0x7D)):
        Image.new(mode, (SIZE, SIZE), value).save(place(tmp_path / str(value), name))
        assert grey(load(tmp_path / str(value))) == [expected, expected]


def test_deep_pictures_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the top goes to the right
    values = halves(0, 4095, "u2").T
    Image.fromarray(values).save(place(tmp_path, "0.png"), exif=exif)
    assert grey(load(tmp_path)) == [255, 0]  # the bottom, which is bright, is on the left


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_what_no_grey_can_be_is_refused(tmp_path: Path, value: float) -> None:
    place(tmp_path, "0.tif").write_bytes(tiff(halves(0.5, value, "f4")))
    with pytest.raises(UserError, match=r"0\.tif: is not a readable image \(it holds (NaN|val)"):
        load(tmp_path)
