"""The image bank: content, addressing, moments, memory and refusals."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_data import make_bank, make_classes

from raymaml.common.errors import UserError
from raymaml.data.bank import BankClass, ClassImages, ImageBank, write_bank

COUNTS = {"train": [3, 1, 5], "val": [2], "test": [4]}


def filled(name: str, split: str, *values: int, channels: int = 1) -> ClassImages:
    """One 2x2 image of each value."""
    images = np.array(values, dtype=np.uint8)[:, None, None, None]
    return ClassImages(name=name, split=split, images=np.tile(images, (1, 2, 2, channels)))


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
    for class_id, item in enumerate(make_classes(COUNTS, 5, 3)):
        np.testing.assert_array_equal(bank.class_images(class_id), item.images)


def test_images_come_in_the_order_of_their_row_numbers(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS, size=5, channels=3)
    everything = np.concatenate([item.images for item in make_classes(COUNTS, 5, 3)])
    rows = np.array([14, 0, 0, 3, 8, 4, 14, 9, 10, 2])
    np.testing.assert_array_equal(bank.images(rows), everything[rows])
    assert bank.images(np.array([], dtype=np.int64)).shape == (0, 5, 5, 3)


@pytest.mark.parametrize("row", [-1, 15])
def test_a_row_outside_the_bank_is_an_error(tmp_path: Path, row: int) -> None:
    bank = make_bank(tmp_path / "bank", COUNTS)
    with pytest.raises(IndexError, match=r"0\.\.14"):
        bank.images(np.array([0, row]))


def test_moments_are_those_of_the_train_split(tmp_path: Path) -> None:
    train = filled("a", "train", 0, 255), filled("b", "train", 255, 255)
    bank = write(tmp_path / "bank", *train, filled("c", "test", 7))
    # three of four images are 1, one is 0: mean 3/4, variance 3/4 * 1/4
    assert bank.mean == pytest.approx((0.75,))
    assert bank.std == pytest.approx(((3 / 16) ** 0.5,))


def test_moments_are_by_channel(tmp_path: Path) -> None:
    images = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    images[0, ..., 1] = 255
    images[..., 2] = 51
    classes = [ClassImages(name="a", split="train", images=images)]
    bank = write_bank(tmp_path / "b", classes, source="s", licence="l", image_shape=(3, 2, 2))
    assert bank.mean == pytest.approx((0.0, 0.5, 0.2))
    assert bank.std == pytest.approx((1.0, 0.5, 1.0))


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


def test_writing_holds_one_class_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def classes() -> Iterator[ClassImages]:
        for item in ("a", "b", "c", "d"):
            assert sum(ref() is not None for ref in alive) <= 1
            images = np.zeros((2, 2, 2, 1), dtype=np.uint8)
            alive.append(weakref.ref(images))
            yield ClassImages(name=item, split="train", images=images)
            del images

    write_bank(tmp_path / "b", classes(), source="s", licence="l", image_shape=(1, 2, 2))
    assert len(alive) == 4


@pytest.mark.parametrize("error", [UserError("broken"), KeyboardInterrupt()])
def test_nothing_remains_of_an_interrupted_import(tmp_path: Path, error: BaseException) -> None:
    def classes() -> Iterator[ClassImages]:
        yield filled("a", "train", 1)
        raise error

    with pytest.raises(type(error)):
        write_bank(tmp_path / "b", classes(), source="s", licence="l", image_shape=(1, 2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "item",
    [
        filled("a", "test", 1),
        ClassImages(name="b", split="test", images=np.zeros((0, 2, 2, 1), dtype=np.uint8)),
        ClassImages(name="b", split="test", images=np.zeros((1, 2, 3, 1), dtype=np.uint8)),
        ClassImages(name="b", split="test", images=np.zeros((1, 2, 2, 1))),  # type: ignore[arg-type]
    ],
    ids=["name given twice", "empty", "shape", "dtype"],
)
def test_a_class_that_no_bank_can_hold_is_refused(tmp_path: Path, item: ClassImages) -> None:
    with pytest.raises(ValueError, match=f"class {item.name}"):
        write(tmp_path / "bank", filled("a", "train", 1), item)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_of_the_same_content_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "bank", filled("a", "train", 1))
    before = (tmp_path / "bank" / "images.arrow").stat()
    write(tmp_path / "bank", filled("a", "train", 1), source="again")
    after = (tmp_path / "bank" / "images.arrow").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_another_bank_is_never_overwritten(tmp_path: Path) -> None:
    first = write(tmp_path / "bank", filled("a", "train", 1))
    with pytest.raises(UserError, match=r"bank: holds another image bank.*data\.bank"):
        write(tmp_path / "bank", filled("a", "train", 2))
    assert ImageBank.open(tmp_path / "bank").hash == first.hash
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis: exists and is not an image bank"):
        write(tmp_path / "thesis", filled("a", "train", 1))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


def rewrite(header: Path, **changes: object) -> None:
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))


SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "bank.json: there is no image bank": lambda header, images: header.unlink(),
    "bank.json: is damaged": lambda header, images: header.write_text(header.read_text()[:-9]),
    "bank.json: schema_version is 99": lambda header, images: rewrite(header, schema_version=99),
    "bank.json: is damaged (image_shape: ": lambda header, images: rewrite(
        header, image_shape=None
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
        ImageBank.open(tmp_path / "bank")
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


def test_the_header_is_a_line_a_class(tmp_path: Path) -> None:
    write(tmp_path / "bank", filled("a", "train", 1), filled("b", "val", 2))
    lines = (tmp_path / "bank" / "bank.json").read_text().splitlines()
    assert '    {"name": "b", "split": "val", "count": 1}' in lines
