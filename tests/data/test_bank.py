"""The image bank: content, addressing, moments, memory and refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_data import make_bank, make_classes, rewritten

from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import BankClass, ClassImages, in_memory

COUNTS = {"train": [3, 1, 5], "val": [2], "test": [4]}


def filled(name: str, split: str, *values: int, channels: int = 1) -> ClassImages:
    """One 2x2 image of each value."""
    images = np.array(values, dtype=np.uint8)[:, None, None, None]
    return in_memory(name, split, np.tile(images, (1, 2, 2, channels)))


def write(folder: Path, *classes: ClassImages, source: str = "s") -> ImageBank:
    return write_bank(folder, classes, source=source, licence="l", image_shape=(1, 2, 2))


def test_an_opened_bank_says_what_was_written(tmp_path: Path) -> None:
    make_bank(tmp_path / "bank", COUNTS, size=5, channels=3)
    bank = ImageBank.open(tmp_path / "bank")
    assert (bank.source, bank.licence, bank.image_shape) == ("random", "none", (3, 5, 5))
    assert bank.classes[2] == BankClass(name="train-2", split="train", count=5)
    assert bank.first_row.tolist() == [0, 3, 4, 9, 11, 15]
    assert bank.num_images == 3 + 1 + 5 + 2 + 4
    assert [bank.class_ids(s).tolist() for s in ("train", "val", "test")] == [[0, 1, 2], [3], [4]]
    assert bank.class_ids("nothing").tolist() == []
    for class_id, (_, (images,)) in enumerate(make_classes(COUNTS, 5, 3)):
        np.testing.assert_array_equal(bank.class_images(class_id), images)


def test_images_come_in_the_order_of_their_row_numbers(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS, size=5, channels=3)
    everything = np.concatenate([images for _, (images,) in make_classes(COUNTS, 5, 3)])
    rows = np.array([14, 0, 0, 3, 8, 4, 14, 9, 10, 2])
    np.testing.assert_array_equal(bank.images(rows), everything[rows])
    assert bank.images(np.array([], dtype=np.int64)).shape == (0, 5, 5, 3)
    for row in (-1, 15):
        with pytest.raises(IndexError, match=r"0\.\.14"):
            bank.images(np.array([0, row]))


def test_moments_are_those_of_the_train_split_by_channel(tmp_path: Path) -> None:
    """Channels that never vary get a standard deviation of 1."""
    images = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    images[:3, ..., 1] = 255  # three of four are 1: variance 3/4 * 1/4
    images[..., 2] = 51
    classes = [in_memory("a", "train", images), in_memory("b", "test", 255 - images)]
    bank = write_bank(tmp_path / "b", classes, source="s", licence="l", image_shape=(3, 2, 2))
    assert bank.mean == pytest.approx((0.0, 0.75, 0.2))
    assert bank.std == pytest.approx((1.0, (3 / 16) ** 0.5, 1.0))


def test_the_hash_covers_shape_names_splits_counts_and_pixels(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"[1, 2, 2]")
    digest.update(b'["a", "train", 2]' + bytes([1] * 4 + [2] * 4))
    digest.update(b'["b", "test", 1]' + bytes([3] * 4))
    bank = write(tmp_path / "0", filled("a", "train", 1, 2), filled("b", "test", 3))
    assert bank.hash == digest.hexdigest()
    others = [
        (filled("x", "train", 1, 2), filled("b", "test", 3)),
        (filled("a", "val", 1, 2), filled("b", "test", 3)),
        (filled("a", "train", 1, 4), filled("b", "test", 3)),
        (filled("a", "train", 1), filled("b", "test", 2, 3)),
        (filled("b", "test", 3), filled("a", "train", 1, 2)),
    ]
    hashes = {write(tmp_path / f"o{i}", *other).hash for i, other in enumerate(others)}
    assert len(hashes | {bank.hash}) == 6
    same = write(
        tmp_path / "same", filled("a", "train", 1, 2), filled("b", "test", 3), source="other"
    )
    assert same.hash == bank.hash


def test_opening_40000_images_reads_none_of_them(tmp_path: Path) -> None:
    make_bank(tmp_path / "bank", {"train": [400] * 100}, size=8, channels=3)
    before = pa.total_allocated_bytes()
    bank = ImageBank.open(tmp_path / "bank")
    views = [bank.class_images(class_id) for class_id in range(100)]
    pixels = 40_000 * 8 * 8 * 3
    assert sum(view.size for view in views) == pixels
    assert pa.total_allocated_bytes() - before < pixels / 100
    assert not any(view.flags.writeable or view.base is None for view in views)


@pytest.mark.parametrize(
    "item",
    [
        filled("a", "test", 1),
        in_memory("b", "test", np.zeros((0, 2, 2, 1), dtype=np.uint8)),
        in_memory("b", "test", np.zeros((1, 2, 3, 1), dtype=np.uint8)),
        in_memory("b", "test", np.zeros((1, 2, 2, 1))),  # type: ignore[arg-type]
    ],
    ids=["name given twice", "empty", "shape", "dtype"],
)
def test_a_class_that_no_bank_can_hold_is_refused(tmp_path: Path, item: ClassImages) -> None:
    with pytest.raises(ValueError, match=f"class {item[0].name}"):
        write(tmp_path / "bank", filled("a", "train", 1), item)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_and_never_overwritten(tmp_path: Path) -> None:
    first = write(tmp_path / "bank", filled("a", "train", 1))
    before = (tmp_path / "bank" / "images.arrow").stat()
    write(tmp_path / "bank", filled("a", "train", 1), source="again")  # the same content
    with pytest.raises(UserError, match=r"bank: holds another image bank.*data\.bank"):
        write(tmp_path / "bank", filled("a", "train", 2))
    assert ImageBank.open(tmp_path / "bank").hash == first.hash
    after = (tmp_path / "bank" / "images.arrow").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis: exists and is not an image bank"):
        write(tmp_path / "thesis", filled("a", "train", 1))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


def rewrite(header: Path, **changes: object) -> None:
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))


def grow(header: Path, count: int) -> None:
    """Let the first class claim ``count`` images."""
    classes = json.loads(header.read_text())["classes"]
    rewrite(header, classes=[classes[0] | {"count": count}, *classes[1:]])


SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "bank.json: there is no image bank": lambda header, images: header.unlink(),
    "bank.json: is damaged": lambda header, images: header.write_text(header.read_text()[:-9]),
    "bank.json: schema_version is 99": lambda header, images: rewrite(header, schema_version=99),
    "bank.json: is damaged (image_shape: ": lambda header, images: rewrite(
        header, image_shape=None
    ),
    "bank.json: is damaged (mean": lambda header, images: rewrite(header, mean="x"),
    "bank.json: is damaged (std": lambda header, images: rewrite(header, std=[0.0]),
    "bank.json: is damaged (source": lambda header, images: rewrite(header, source=3),
    "bank.json: is damaged (hash": lambda header, images: rewrite(header, hash="../x"),
    "bank.json: is damaged (classes": lambda header, images: rewrite(header, classes=[{}]),
    "bank.json: is damaged (1170 bytes cannot hold ": lambda header, images: grow(header, 10**12),
    "images.arrow: is damaged (batch 0 has 1 rows": lambda header, images: grow(header, 3),
    "images.arrow: is damaged (batch 0 is compressed)": lambda header, images: (
        images.write_bytes(rewritten(images.read_bytes(), lambda it: it, compression="zstd")),
        rewrite(header, images_bytes=images.stat().st_size),
    ),
    "images.arrow: is truncated": lambda header, images: images.write_bytes(
        images.read_bytes()[:-1]
    ),
    "images.arrow: is missing": lambda header, images: images.unlink(),
    "images.arrow: is damaged": lambda header, images: images.write_bytes(
        images.read_bytes()[:-10] + b"0123456789"
    ),
    "images.arrow: is not of this bank.json": lambda header, images: rewrite(
        header, classes=[{"name": "a", "split": "train", "count": 1}]
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_damaged_bank_is_refused_by_file_with_the_remedy(tmp_path: Path, message: str) -> None:
    write(tmp_path / "bank", filled("a", "train", 1), filled("b", "val", 2))
    SPOILED[message](tmp_path / "bank" / "bank.json", tmp_path / "bank" / "images.arrow")
    with pytest.raises(UserError, match="raymaml data import CONFIG") as caught:
        ImageBank.open(tmp_path / "bank").verify()
    assert str(caught.value).startswith(f"{tmp_path / 'bank'}/{message}")


def test_verify_finds_one_altered_pixel(tmp_path: Path) -> None:
    bank = write(tmp_path / "bank", filled("a", "train", 77), filled("b", "val", 2))
    bank.verify()
    images = tmp_path / "bank" / "images.arrow"
    content = images.read_bytes()
    assert content.count(bytes([77] * 4)) == 1
    images.write_bytes(content.replace(bytes([77] * 4), bytes([77, 77, 77, 78])))
    with pytest.raises(UserError, match=r"images\.arrow: is altered"):
        ImageBank.open(tmp_path / "bank").verify()
