"""Copies: which kinds are found, how the search compares, and the three policies of an import."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers_imports import import_source, zipped
from numpy.typing import NDArray
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import in_memory
from raymaml.data.duplicates import Fingerprints, candidates, found_in, survey

Pixels = NDArray[np.uint8]
LARGE, SIZE, COUNT = 96, 32, 40
"""Sides in pixels of pictures and of the images in the bank; number of pictures."""


def pictures(seed: int, count: int = COUNT) -> Pixels:
    """Made-up photographs: colours that change slowly, with grain: [n, 96, 96, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    smooth = np.stack([resized(each, LARGE) for each in coarse])
    return np.clip(smooth + generator.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def resized(image: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def shrunk(images: Pixels) -> Pixels:
    """As an import makes them: [n, 32, 32, 3]."""
    return np.stack([resized(each, SIZE) for each in images])


def jpeg(image: Pixels, quality: int) -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def bank_of(folder: Path, **classes: Pixels) -> ImageBank:
    """A bank of ``split_name`` -> images."""
    planned = [in_memory(name, name.partition("_")[0], own) for name, own in classes.items()]
    shape = (3, SIZE, SIZE)
    return write_bank(folder, planned, source="s", licence="l", image_shape=shape)


FOUND: dict[str, Callable[[Pixels], Pixels]] = {
    "JPEG of quality 90": lambda image: jpeg(image, 90),
    "JPEG of quality 50": lambda image: jpeg(image, 50),
    "twice the size": lambda image: resized(image, 2 * LARGE),
    "two thirds of the size, then JPEG": lambda image: jpeg(resized(image, 64), 90),
    "a little brighter": lambda image: np.minimum(image.astype(int) + 4, 255).astype(np.uint8),
}
NOT_FOUND: dict[str, Callable[[Pixels], Pixels]] = {
    "mirrored": lambda image: image[:, ::-1],
    "turned": lambda image: image.swapaxes(0, 1)[::-1],
    "cropped by an eighth": lambda image: image[12:-12, 12:-12],
    "inverted": lambda image: 255 - image,
    "half as bright": lambda image: image // 2,
}


@pytest.mark.parametrize("kind", [*FOUND, *NOT_FOUND])
def test_which_copies_are_found(kind: str, tmp_path: Path) -> None:
    originals, others = pictures(0), shrunk(pictures(1))
    copies = np.stack([resized((FOUND | NOT_FOUND)[kind](each), SIZE) for each in originals])
    bank = bank_of(tmp_path / "b", train_a=shrunk(originals), train_b=others, test_a=copies)
    overlaps = found_in(bank).overlaps
    if kind in NOT_FOUND:
        assert overlaps == ()
        return
    (leak,) = overlaps
    assert (leak.split, leak.other, leak.images, leak.equal) == ("test", "train", COUNT, 0)
    assert leak.near >= 0.95 * COUNT
    numbers = [re.findall(r"#(\d+)", each) for each in leak.examples]
    assert all(left == right for left, right in numbers)


def test_blank_pictures_of_two_colours_are_not_alike(tmp_path: Path) -> None:
    """They have no variance to compare with: equal ones alone are copies."""
    blank = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    bank = bank_of(tmp_path / "b", train_a=blank + 7, train_b=blank + 8, test_a=blank + 8)
    (leak,) = found_in(bank).overlaps
    assert (leak.equal, leak.near, leak.examples) == (1, 0, ("test/test_a #0 = train/train_b #0",))


def test_overlaps_count_images_of_the_later_split(tmp_path: Path) -> None:
    """Each of 10 pictures of val is in train, 3 of test in val, 2 in two classes of train."""
    one, two, three = (shrunk(pictures(seed, 10)) for seed in range(3))
    bank = bank_of(
        tmp_path / "b",
        train_a=np.concatenate([one, one]),
        train_b=np.concatenate([two, one[:2]]),
        val_a=one,
        test_a=np.concatenate([three, one[:3]]),
    )
    found = found_in(bank)
    counts = {(each.other, each.split): (each.equal, each.images) for each in found.overlaps}
    assert counts == {
        ("train", "train"): (2 + 2 + 2, 32),  # rows 0, 1, 10, 11 of a; 10, 11 of b
        ("train", "val"): (10, 10),
        ("train", "test"): (3, 13),
        ("val", "test"): (3, 13),
    }
    assert found.in_class == 10
    assert [(each.other, each.split) for each in found.leaks] == [
        *(("train", "val"), ("train", "test"), ("val", "test"))
    ]
    leaking = survey(bank).leaking()
    assert np.flatnonzero(leaking).tolist() == [*range(20), 30, 31, 32, 33, 34]


def test_the_search_misses_no_pair_within_three_bits() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for row in range(200):  # every third row of these is 0, 1, .. 5 bits from the one before
        if row % 3 == 2:
            bits = generator.choice(64, row % 6, replace=False).astype(np.uint64)
            hashes[row] = hashes[row - 1] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=0)
    found = {tuple(sorted(pair)) for pairs in candidates(hashes) for pair in pairs.tolist()}
    wanted = {
        (left, right)
        for left, right in combinations(range(300), 2)
        if int(hashes[left] ^ hashes[right]).bit_count() <= 3
    }
    assert len(wanted) > 30
    assert found == wanted


def test_the_search_stays_near_linear_where_all_images_share_a_hash() -> None:
    """4 segments, and at most 64 neighbours of each of 1,000 images in each."""
    pairs = sum(len(each) for each in candidates(np.zeros(1000, np.uint64)))
    assert pairs == 4 * sum(1000 - step for step in range(1, 65))


def test_fingerprints_do_not_depend_on_parts() -> None:
    planes = np.moveaxis(shrunk(pictures(0)), -1, 1)
    whole, parts = Fingerprints(), Fingerprints()
    whole.add(planes)
    for part in np.array_split(planes, 7):
        parts.add(part)
    assert (whole.exact == parts.exact).all()
    assert (whole.perceptual == parts.perceptual).all()


# The import of a folder: 2 classes of 4 pictures a split. test/x/0 is train/a/0 as it is, test/x/1
# is train/a/1 compressed, val/m/0 is train/b/0, val/m/1 is test/y/0; and train/b/3 is train/b/2.


def write_folder(folder: Path) -> Path:
    classes = {"train": "ab", "val": "mn", "test": "xy"}
    names = [(split, name) for split, own in classes.items() for name in own]
    own = dict(zip(names, np.split(pictures(5, 24), 6), strict=True))
    own["test", "x"][:2] = own["train", "a"][0], jpeg(own["train", "a"][1], 75)
    own["val", "m"][:2] = own["train", "b"][0], own["test", "y"][0]
    own["train", "b"][3] = own["train", "b"][2]
    for (split, name), images in own.items():
        for number, image in enumerate(images):
            path = folder / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def run(folder: Path, lines: list[str], **changes: object) -> ImageBank:
    own = partial(import_source, "image-folder", write_folder(folder / "in"), folder, SIZE)
    return own(tell=lines.append, **changes)


def counts(bank: ImageBank) -> dict[str, int]:
    return {each.name: each.count for each in bank.classes}


def test_keep_warns_of_leaks_and_takes_equal_images_of_a_class_once(tmp_path: Path) -> None:
    lines: list[str] = []
    bank = run(tmp_path, lines)
    inside = tmp_path / "in"
    assert counts(bank) == {"a": 4, "b": 3, "m": 4, "n": 4, "x": 4, "y": 4}
    bank.verify()
    assert lines[0] == (
        f"equal to another image of their class: 1 images, first {inside}/train/b/3.png; left out"
    )
    assert [line.partition(", such as")[0] for line in lines[1:4]] == [
        "warning: 1 of 8 val images are in train as well (1 equal, 0 nearly equal)",
        "warning: 2 of 8 test images are in train as well (1 equal, 1 nearly equal)",
        "warning: 1 of 8 test images are in val as well (1 equal, 0 nearly equal)",
    ]
    assert f"such as {inside}/test/x/0.png = {inside}/train/a/0.png; data.source.dupl" in lines[2]
    assert lines[4:] == ["train: a, b", "val: m, n", "test: x, y"]
    kept = ImageBank.open(bank.folder).duplicates
    assert kept is not None
    assert [each.equal + each.near for each in kept.leaks] == [1, 2, 1]
    assert kept.leaks[1].examples[1] == f"{inside}/test/x/1.png = {inside}/train/a/1.png"
    assert sorted(path.name for path in bank.folder.iterdir()) == ["bank.json", "images.arrow"]


def test_drop_keeps_test_whole(tmp_path: Path) -> None:
    """From train go a/0, a/1 (in test) and b/0 (in val); from val m/1 (in test)."""
    lines: list[str] = []
    bank = run(tmp_path, lines, duplicates="drop")
    assert counts(bank) == {"a": 2, "b": 2, "m": 3, "n": 4, "x": 4, "y": 4}
    bank.verify()
    second = np.asarray(Image.open(tmp_path / "in" / "train" / "a" / "2.png"))
    assert (bank.class_images(0)[0] == resized(second, SIZE)).all()
    assert sum("; dropped from train" in line for line in lines) == 2
    assert sum("; dropped from val" in line for line in lines) == 1
    assert not any(line.startswith("warning") for line in lines)
    assert bank.duplicates is not None
    assert bank.duplicates.overlaps == ()
    assert survey(bank).leaking().sum() == 0
    fewer = run(tmp_path / "o", [], duplicates="drop", images=2)
    assert fewer.hash == bank.hash


def test_drop_names_classes_that_become_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^without copies, split train: 2 of 2 classes have fewer"):
        run(tmp_path, [], duplicates="drop", images=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_fewer_queries_fit_what_is_left_without_copies(tmp_path: Path) -> None:
    """Of two equal pictures of train/b one stays: it has 3, and 1 shot leaves 2 queries."""
    bank = run(tmp_path, [], images=4, fit_queries=True)
    assert counts(bank)["b"] == 3


def test_refuse_imports_nothing_and_names_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, [], duplicates="refuse")
    assert len(caught.value.problems) == 3
    assert "refuse, but 2 of 8 test images are in train as well" in caught.value.problems[1]
    assert "duplicates: drop takes them out" in caught.value.problems[1]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_published_data_set_stays_as_published(tmp_path: Path) -> None:
    """Each of 9 characters has two equal drawings, and each is in three splits."""
    image = io.BytesIO()
    Image.fromarray(pictures(0)[0]).convert("1").save(image, "PNG")
    for name, alphabets in (("images_background", "ABCDEF"), ("images_evaluation", "Z")):
        files = {
            f"{name}/{alphabet}/character0{number}/000{drawing}_01.png": image.getvalue()
            for alphabet in alphabets
            for number in (1, 2)
            for drawing in (1, 2)
        }
        (tmp_path / f"{name}.zip").write_bytes(zipped(files))
    lines: list[str] = []
    split = {"split": "background_evaluation", "rotations": False}
    bank = import_source("omniglot", tmp_path, tmp_path, tell=lines.append, **split)
    assert bank.num_images == 7 * 2 * 2
    assert lines[0].startswith("equal to another image of their class: 14 images, first train/A/")
    assert lines[0].endswith(
        "; they stay, as published, so support and query can be one picture;"
        " data.source.duplicates: drop leaves them out"
    )
    assert bank.duplicates is not None
    assert bank.duplicates.in_class == 14


def test_a_header_without_findings_is_of_before(tmp_path: Path) -> None:
    same = shrunk(pictures(0))
    bank = bank_of(tmp_path / "b", train_a=same, test_a=same)
    assert bank.duplicates is None
    assert "duplicates" not in json.loads((bank.folder / "bank.json").read_text())
    (leak,) = found_in(bank).leaks
    assert leak.equal == COUNT
