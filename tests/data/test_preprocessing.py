"""From a picture to pixels and tensors without a bank: the importers' own result, to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError

from raymaml.common.errors import UserError
from raymaml.config.data_sources import ImageFolderSource
from raymaml.config.schema import DataConfig
from raymaml.data.importers.image_folder import plan_image_folder
from raymaml.data.importers.images import decode_files, squared, squashed
from raymaml.data.importers.omniglot import _strokes
from raymaml.data.preprocessing import Preprocessing, preprocessing_of

GENERATOR = np.random.default_rng(0)


def made(fit: str = "crop", channels: int = 3, **changes: Any) -> Preprocessing:
    moments = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    shape = (channels, 16, 16)
    return Preprocessing(**({"image_shape": shape, "fit": fit} | moments | changes))


def noise(width: int = 40, height: int = 24, channels: int = 3) -> Image.Image:
    return Image.fromarray(GENERATOR.integers(0, 256, (height, width, channels), np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pictures(folder: Path) -> list[Path]:
    """Of every kind: palette, 16-bit, CMYK, alpha, turned, animated, one bit."""
    image, turned = noise(), Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(GENERATOR.integers(0, 60000, (24, 40), np.uint16))
    frames = {"save_all": True, "append_images": [noise()]}
    return [
        save(image, folder / "plain.png"),
        save(image.convert("P"), folder / "palette.png"),
        save(image.convert("CMYK"), folder / "cmyk.jpg"),
        save(noise(channels=4), folder / "alpha.png"),
        save(image, folder / "turned.jpg", exif=turned),
        save(image, folder / "animated.gif", **frames),
        save(deep, folder / "deep.png"),
        save(image.convert("1"), folder / "bits.png"),
    ]


@pytest.mark.parametrize("mode", ["rgb", "gray"])
def test_a_picture_becomes_the_pixels_of_the_importer(tmp_path: Path, mode: Any) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    paths = sorted(pictures(tmp_path / "train" / "a"))
    source = ImageFolderSource(kind="image-folder", path=tmp_path, mode=mode)
    (planned,) = plan_image_folder(source, 16).classes
    expected = planned.load()
    found = made("crop", 3 if mode == "rgb" else 1)
    for path, pixels in zip(paths, expected, strict=True):
        assert np.array_equal(found.pixels(path), pixels), path.name
        assert np.array_equal(found.pixels(path.read_bytes()), pixels), path.name
        with Image.open(path) as image:
            before = image.size
            assert np.array_equal(found.pixels(image), pixels), path.name
            assert image.size == before  # the user's own image is left alone
    assert found.pixels(paths[0]).shape == expected.shape[1:]


def test_each_source_has_the_squares_of_its_importer(tmp_path: Path) -> None:
    path = save(noise(), tmp_path / "a.png")
    for fit, transform in {"crop": squared(16), "squash": squashed(16)}.items():
        assert np.array_equal(made(fit).pixels(path), decode_files([path], transform)[0])
    drawing = save(noise().convert("1"), tmp_path / "b.png")
    strokes = decode_files([drawing], partial(_strokes, size=16))[0]
    assert np.array_equal(made("squash", 1, inverted=True).pixels(drawing), strokes)


SOURCES = {
    "{kind: glyphs}": ("ink", False),
    "{kind: omniglot, path: x}": ("squash", True),
    "{kind: image-folder, path: x}": ("crop", False),
    "{kind: mini-imagenet, path: x}": ("squash", False),
    "{kind: fc100, path: x}": ("squash", False),
    "{kind: cub, path: x, split: cub_100_50_50}": ("crop", False),
    "{kind: cub, path: x, split: cub_100_50_50, crop_to_box: true}": ("squash", False),
    "{kind: inaturalist-2017, path: x}": ("crop", False),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_config_says_how(source: str, make_config: Any) -> None:
    data: DataConfig = make_config("x", f"data.source={source}").data
    assert preprocessing_of(data, (1, 16, 16), None) is None  # the bank alone knows its moments
    known = data.model_copy(update={"normalize": "none"})
    found = preprocessing_of(known, (1, 16, 16), None)
    assert found is not None
    assert (found.fit, found.inverted) == SOURCES[source]
    assert (found.mean, found.std) == ((0.0,), (1.0,))


def test_a_drawn_character_is_bright_and_in_the_middle() -> None:
    """A square of 10 pixels in a corner of 40: centred, it takes 4 of 16 pixels, 6 to 9."""
    found = made("ink", 1)
    for paper, ink in ((255, 0), (0, 255)):
        image = Image.new("L", (60, 40), paper)
        ImageDraw.Draw(image).rectangle((2, 3, 11, 12), fill=ink)
        pixels = found.pixels(image)[:, :, 0]
        assert (pixels[7:9, 7:9] > 250).all()
        assert (pixels[:5] < 10).all()
        assert (pixels[11:] < 10).all()
        assert abs(pixels.astype(int) - pixels[::-1].astype(int)).max() < 10
    long = Image.new("L", (40, 40), 255)
    ImageDraw.Draw(long).rectangle((0, 18, 38, 21), fill=0)  # 39 of 40, at most 0.8 of the side
    row = found.pixels(long)[8, :, 0]
    assert row[0] < 10
    assert row[3] > 200
    assert found.pixels(Image.new("L", (3000, 2), 255)).shape == (16, 16, 1)  # nothing drawn


def test_arrays_and_tensors_are_pictures_too() -> None:
    found, values = made(), GENERATOR.integers(0, 256, (16, 16, 3), np.uint8)
    same = [values, values.astype(np.int64), values / 255, torch.from_numpy(values).movedim(-1, 0)]
    for each in same:
        assert np.array_equal(found.pixels(each), values)
    assert np.array_equal(found.pixels(values[..., 0]), np.repeat(values[..., :1], 3, 2))
    assert found.pixels(np.eye(16, dtype=bool)).max() == 255
    for bad in (np.zeros((2, 2, 2, 2)), np.zeros((4, 4, 5)), np.full((4, 4), np.nan), np.zeros(())):
        with pytest.raises(UserError, match="an array: is not a readable image"):
            found.pixels(bad)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: is not a readable image \(unknown format"):
        made().pixels(path)
    with pytest.raises(UserError, match="bytes: is not a readable image"):
        made().pixels(b"no picture")
    with pytest.raises(UserError, match=r"missing\.png: does not exist"):
        made().pixels(str(tmp_path / "missing.png"))
    with pytest.raises(UserError, match=r"exceeds 100\); scale it down"):
        made(max_pixels=100).pixels(save(noise(), tmp_path / "large.png"))
    with pytest.raises(UserError, match="takes images of 4 channels"):
        made(channels=4).pixels(noise())


def test_a_tensor_has_the_moments_taken_away() -> None:
    """(255 / 255 - 0.5) / 0.25 = 2 and (0 - 0.5) / 0.25 = -2."""
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[0, 2, 3] = 255
    pixels.flags.writeable = False
    found = made().tensor(pixels)
    assert (found.shape, found.dtype) == ((1, 3, 16, 16), torch.float32)
    assert found[0, :, 2, 3].tolist() == [2, 2, 2]
    assert found[0, :, 0, 0].tolist() == [-2, -2, -2]
    assert torch.equal(made().tensor(torch.from_numpy(pixels.copy())), found)


def test_moments_are_those_of_each_channel() -> None:
    with pytest.raises(ValidationError, match="mean and std have not 3 entries"):
        made(mean=(0.5,))
    again = Preprocessing.model_validate_json(made(mean=(0.1, 0.2, 1 / 3)).model_dump_json())
    assert again == made(mean=(0.1, 0.2, 1 / 3))
