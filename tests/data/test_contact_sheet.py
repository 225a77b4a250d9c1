"""Contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_data import make_bank, spec_of
from PIL import Image

from raymaml.data.bank import write_bank
from raymaml.data.bank_format import in_memory
from raymaml.data.contact_sheet import WIDTH, bank_sheet, episode_sheet
from raymaml.data.sampling import sample_episode

COUNTS = {"train": [9] * 5, "val": [9] * 2, "test": [9] * 3}


def holds(sheet: np.ndarray, image: np.ndarray, zoom: int) -> bool:
    """Tell whether ``image`` [H, W, C], enlarged, is somewhere on ``sheet`` [H, W, 3]."""
    tile = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(zoom, 0).repeat(zoom, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape[:2], axis=(0, 1))
    corners = np.argwhere((sheet[: windows.shape[0], : windows.shape[1]] == tile[0, 0]).all(-1))
    return any((windows[y, x].transpose(1, 2, 0) == tile).all() for y, x in corners)


@pytest.mark.parametrize(("channels", "size", "zoom"), [(1, 28, 3), (3, 20, 4), (3, 60, 1)])
def test_an_episode_sheet_shows_all_its_images(
    tmp_path: Path, channels: int, size: int, zoom: int
) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS, size=size, channels=channels)
    rows = sample_episode(bank, spec_of(3, 1, 4, 1), 0, "train", 0)
    episode_sheet(bank, rows, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        sheet = np.asarray(picture)
    for image in bank.images(np.concatenate([rows.support, rows.query])):
        assert holds(sheet, image, zoom)
    absent = np.setdiff1d(np.arange(bank.num_images), np.concatenate([rows.support, rows.query]))
    assert not any(holds(sheet, image, zoom) for image in bank.images(absent[:9]))


def test_a_bank_sheet_shows_classes_of_every_split(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS, size=28)
    path = tmp_path / "sheet.png"
    bank_sheet(bank, path, classes_per_split=3, images_per_class=4)
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    shown = [holds(sheet, bank.class_images(class_id)[0], 3) for class_id in range(10)]
    assert [sum(shown[:5]), sum(shown[5:7]), sum(shown[7:])] == [3, 2, 3]
    first = shown.index(True)
    assert [holds(sheet, image, 3) for image in bank.class_images(first)] == [True] * 4 + [
        False
    ] * 5


def test_names_may_be_long_and_of_any_script(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 1), dtype=np.uint8)
    names = ("a name that is so long that it would run into its images " * 2, "\u6f22\u5b57")
    classes = [in_memory(name, "test", images) for name in names]
    bank = write_bank(tmp_path / "bank", classes, source="s", licence="l", image_shape=(1, 8, 8))
    bank_sheet(bank, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width == WIDTH


def test_wrong_queries_are_marked_and_large_images_are_reduced(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS, size=28)
    rows = sample_episode(bank, spec_of(3, 1, 4, 1), 0, "train", 0)
    red = []
    for wrong in (0, 1, 12):
        taken = rows.query_labels.copy()
        taken[:wrong] = (taken[:wrong] + 1) % 3
        episode_sheet(bank, rows, tmp_path / "sheet.png", taken)
        with Image.open(tmp_path / "sheet.png") as picture:
            red.append(int((np.asarray(picture) == (207, 34, 46)).all(-1).sum()))
    # a frame of 4 pixels around 84: 92 * 92 - 84 * 84, and a number on the image inside
    assert red[0] == 0
    assert 92**2 - 84**2 < red[1] < 92**2 - 84**2 + 26 * 40
    assert red[2] > 12 * (92**2 - 84**2)
    large = make_bank(tmp_path / "large", {"train": [2], "val": [1], "test": [1]}, size=400)
    bank_sheet(large, tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.width == WIDTH
        assert picture.height < 4 * 300  # three classes of a line of at most 168 pixels
