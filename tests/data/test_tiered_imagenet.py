"""tiered-ImageNet in its two forms, on small files of exactly these forms, and its memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import LISTS
from helpers_imports import classes, counts, import_source, plan_source, problems_of, python2
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS
from raymaml.data.importers.plan import ImportPlan
from raymaml.data.importers.tiered_imagenet import BENCHMARK

plan = partial(plan_source, "tiered-imagenet")
some = partial(plan, verify_counts=False)
FIRST = {"train": 0, "val": 351, "test": 448}


def colours(labels: list[int], size: int = 4) -> np.ndarray:
    """Image i is filled with red = its label mod 256, green = i mod 256, blue = 7."""
    images = np.empty((len(labels), size, size, 3), np.uint8)
    images[...] = [[[[label % 256, i % 256, 7]]] for i, label in enumerate(labels)]
    return images


def labels_of(split: str, classes: int, each: int) -> list[int]:
    """Classes take turns: no class stands together."""
    return [FIRST[split] + i % classes for i in range(classes * each)]


def png(pixels: np.ndarray) -> np.ndarray:
    """What cv2.imencode gives: a column of the bytes of an ordinary PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)[:, None]


def write_npz(
    folder: Path, split: str, labels: list[int], compressed: bool = False, size: int = 4
) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(folder / f"{split}_images.npz", images=colours(labels, size)[..., ::-1])  # BGR
    (folder / f"{split}_labels.pkl").write_bytes(python2({"labels": labels}))


def write_pngs(folder: Path, split: str, labels: list[int], flat: bool = False) -> None:
    images = [png(pixels) for pixels in colours(labels)]
    own = np.array(labels) - min(labels)
    content = {
        "label_specific": own,
        "label_general": own // 2,
        "label_specific_str": ["crane"] * (own.max() + 1),  # two classes of ImageNet are called so
        "label_general_str": ["bird"],
    }
    pngs = python2([image.ravel() for image in images] if flat else images)
    (folder / f"{split}_images_png.pkl").write_bytes(pngs)
    (folder / f"{split}_labels.pkl").write_bytes(python2(content))


def first_pixels(found: ImportPlan, name: str) -> list[list[int]]:
    (own,) = (planned for planned in found.classes if planned.name.startswith(name))
    pixels: list[list[int]] = own.load()[:, 0, 0].tolist()
    return pixels


def test_published_numbers() -> None:
    assert sum(BENCHMARK.num_images.values()) == 779_165
    assert [BENCHMARK.num_images[s] for s in SPLITS] == [448_695, 124_261, 206_209]
    assert sum(BENCHMARK.num_classes.values()) == 608
    path = LISTS / "tiered_imagenet_wnids.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    lists = json.loads(path.read_text())
    assert {split: len(names) for split, names in lists.items()} == BENCHMARK.num_classes


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_npz_files_are_turned_from_bgr_to_rgb(tmp_path: Path, compressed: bool) -> None:
    for split in SPLITS:
        write_npz(tmp_path, split, labels_of(split, 3, 2), compressed)
    found = some(tmp_path, 4)
    assert counts(found) == [(3, 6)] * 3
    # class 1 of val has label 352 = 96 mod 256, and its rows are 1 and 4
    assert first_pixels(found, "val-352") == [[96, 1, 7], [96, 4, 7]]
    assert "npz files of BGR pixels (MetaOptNet): train train_images.npz" in found.source
    assert found.classes[0].load().shape == (2, 4, 4, 3)
    assert some(tmp_path, 8).classes[0].load().shape == (2, 8, 8, 3)


@pytest.mark.parametrize("flat", [False, True], ids=["column", "flat"])
def test_pickles_of_png_files_are_rgb(tmp_path: Path, flat: bool) -> None:
    for split in SPLITS:
        write_pngs(tmp_path, split, labels_of(split, 3, 2), flat)
    found = some(tmp_path)
    assert classes(found) == [(s, f"{s}-00{label} crane", 2) for s in SPLITS for label in range(3)]
    assert first_pixels(found, "val-001") == [[96, 1, 7], [96, 4, 7]]
    assert "pickles of PNG files (Ren et al.)" in found.source


def test_splits_are_told_by_the_number_of_classes(tmp_path: Path) -> None:
    # labels that start at 0 and names that mislead
    # "b" is of no split: neither by its number of classes nor by its name
    for name, size in {"a": 97, "train": 160, "test": 351, "b": 350}.items():
        write_npz(tmp_path, name, [label % size for label in range(2 * size)])
    found = some(tmp_path)
    assert counts(found) == [(351, 702), (97, 194), (160, 320)]
    places = "train test_images.npz, val a_images.npz, test train_images.npz"
    assert found.source.endswith(places)


def test_images_without_labels_are_named(tmp_path: Path) -> None:
    for split in SPLITS:
        write_npz(tmp_path, split, labels_of(split, 3, 2))
    (tmp_path / "val_labels.pkl").write_bytes(python2({"labels": [351, 352]}))
    (tmp_path / "train_labels.pkl").unlink()
    (tmp_path / "test_labels.pkl").unlink()
    problems = problems_of(some, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == [
        str(tmp_path / f"{split}_images.npz") for split in ("test", "train", "val")
    ]
    assert "holds 6 images, but no pickle holds as many labels" in problems[0]
    assert "val_labels.pkl 2" in problems[0]


def rewritten(path: Path, change: Any) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_damaged_npz_files_are_named(tmp_path: Path) -> None:
    for split in SPLITS:
        write_npz(tmp_path, split, labels_of(split, 3, 2), compressed=True)
    path = tmp_path / "val_images.npz"
    whole = path.read_bytes()
    rewritten(path, lambda data: data[:100] + bytes(30) + data[130:])
    with pytest.raises(UserError, match=r"val_images\.npz: is not a whole npz file"):
        some(tmp_path).classes[3].load()
    path.write_bytes(whole)
    stream = io.BytesIO()
    np.save(stream, colours([1, 2])[..., ::-1])
    for content, says in (
        (stream.getvalue().replace(b"(2,", b"(9,"), r"declared as uint8 \(9, 4, 4, 3\)"),
        (stream.getvalue().replace(b"|u1", b"|O8"), "arrays of objects are refused"),
        (b"no array", "is not a whole npz file"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
        with pytest.raises(UserError, match=says):
            some(tmp_path)


def test_a_broken_png_is_named_by_its_number(tmp_path: Path) -> None:
    for split in SPLITS:
        write_pngs(tmp_path, split, labels_of(split, 2, 2))
    rewritten(tmp_path / "val_images_png.pkl", lambda data: data.replace(b"IHDR", b"XHDR", 3))
    with pytest.raises(UserError) as caught:
        some(tmp_path).classes[2].load()
    assert [problem.split(" is not")[0] for problem in caught.value.problems] == [
        f"{tmp_path / 'val_images_png.pkl'}: image {row}:" for row in (0, 2)
    ]


def test_an_import_makes_a_bank_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split in SPLITS:
        write_npz(tmp_path / "in", split, labels_of(split, 3, 3), compressed=True, size=8)
    bank = import_source(
        "tiered-imagenet", tmp_path / "in", tmp_path, ways=3, images=3, verify_counts=False
    )
    assert bank.class_images(1)[:, 0, 0].tolist() == [[1, 1, 7], [1, 4, 7], [1, 7, 7]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "in"]


IMPORT = """
    import resource, sys
    from pathlib import Path
    from helpers_imports import import_source

    def resident():  # MiB, the highest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    folder = Path(sys.argv[1])
    before = resident()
    bank = import_source("tiered-imagenet", folder, folder, 84, verify_counts=False)
    print(bank.num_images, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stored", "compressed", "png"])
def test_memory_does_not_grow_with_the_files(tmp_path: Path, form: str) -> None:
    """12,000 images are 242 MiB; classes of 60 images are 1.2 MiB. An import may take 64 MiB."""
    images, each = {"train": 12_000, "val": 120, "test": 120}, 60
    noise = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    file = png(noise)
    assert len(file) > 20_000  # as real ones
    for split, count in images.items():
        labels = [FIRST[split] + i % (count // each) for i in range(count)]
        (tmp_path / f"{split}_labels.pkl").write_bytes(python2({"labels": labels}))
        if form == "png":
            (tmp_path / f"{split}_images_png.pkl").write_bytes(python2([file] * count))
        else:
            save = np.savez if form == "stored" else np.savez_compressed
            pixels = np.zeros((count, 84, 84, 3), np.uint8)
            # two rows of noise: what unpacks to over 100 times as much is refused
            pixels[:, :2] = np.random.default_rng(1).integers(0, 256, (count, 2, 84, 3))
            save(tmp_path / f"{split}_images.npz", images=pixels)
            del pixels
    own = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{own.parents[1]}:{own}"}
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    imported, mebibytes = outcome.stdout.split()
    assert int(imported) == 12_240
    assert float(mebibytes) < 64
