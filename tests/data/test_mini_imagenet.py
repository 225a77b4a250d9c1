"""mini-ImageNet in its four forms, on small files of exactly these forms."""

from __future__ import annotations

import csv
import json
import lzma
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import LISTS
from helpers_imports import classes, counts, plan_source, problems_of, python2, save_halves
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.data.importers.mini_imagenet import ilsvrc_files

plan = partial(plan_source, "mini-imagenet")
SIZES = {"train": 64, "val": 16, "test": 20}
FIRST = {"train": 0, "val": 64, "test": 80}
GIDARIS = "miniImageNet_category_split_{}.pickle"
WNIDS = {split: sorted(files) for split, files in ilsvrc_files().items()}

Dump = Callable[[Any], bytes]


def dump3(value: Any) -> bytes:
    return pickle.dumps(value, protocol=4)


def data_labels(first: int, classes: int, each: int, size: int = 2, **more: Any) -> dict[Any, Any]:
    """The form of Gidaris. Classes take turns; image i is filled with (label, i mod 256, 0)."""
    labels = [first + i % classes for i in range(classes * each)]
    images = np.empty((len(labels), size, size, 3), np.uint8)
    images[...] = [[[[label, i % 256, 0]]] for i, label in enumerate(labels)]
    return {"data": images, "labels": labels, **more}


def cache(wnids: list[str], each: int) -> dict[Any, Any]:
    """The form of few-shot-ssl: image i is filled with (class, i mod 256, 0)."""
    images = data_labels(0, len(wnids), each)["data"]
    rows = {wnid: range(i, len(images), len(wnids)) for i, wnid in enumerate(wnids)}
    return {"image_data": images, "class_dict": {wnid: list(own) for wnid, own in rows.items()}}


def write(folder: Path, files: dict[str, Any], dump: Dump = dump3) -> None:
    for name, value in files.items():
        (folder / name).write_bytes(dump(value))


FULL = [(64, 38_400), (16, 9_600), (20, 12_000)]


@pytest.mark.parametrize("dump", [dump3, python2], ids=["python 3", "python 2"])
@pytest.mark.parametrize(
    "names",
    [
        {"train": GIDARIS.format("train_phase_train"), "val": GIDARIS.format("val")},
        {"train": "b", "val": "train.pkl"},  # names do not matter
    ],
    ids=["gidaris", "misleading"],
)
def test_pickles_of_data_and_labels_are_told_by_content(
    tmp_path: Path, dump: Dump, names: dict[str, str]
) -> None:
    names = {**names, "test": names["val"].replace("val", "test").replace("train", "val")}
    files = {names[split]: data_labels(FIRST[split], SIZES[split], 600) for split in SIZES}
    # what plain classification is tested on: further images of the 64 classes, and train and val
    files["train_phase_val.pickle"] = data_labels(0, 64, 293)
    files["train_phase_test.pickle"] = data_labels(0, 64, 300)
    files["trainval.pickle"] = data_labels(0, 80, 600)
    write(tmp_path, files, dump)
    found = plan(tmp_path, 2)
    assert counts(found) == FULL
    assert found.problems == ()
    for split, name in names.items():
        assert f"{split} {name}" in found.source
    assert "Gidaris" in found.source
    assert "non-commercial" in found.licence
    assert "trainval" not in found.source
    # the classes are sorted by label; images of a class keep their order
    images = found.classes[64 + 3].load()
    assert images.shape == (600, 2, 2, 3)
    assert images[:3, 0, 0].tolist() == [[67, 3, 0], [67, 19, 0], [67, 35, 0]]


def test_labels_may_start_at_0_in_every_file_and_keys_may_be_bytes(tmp_path: Path) -> None:
    for split, size in SIZES.items():
        content = {key.encode(): item for key, item in data_labels(0, size, 600).items()}
        write(tmp_path, {f"{split}.pickle": content})
    found = plan(tmp_path, 2)
    assert counts(found) == FULL
    assert found.classes[64].name == "val-000"


def test_names_of_the_classes_are_kept_and_tell_the_split(tmp_path: Path) -> None:
    files = {}
    for name, split in {"a": "test", "b": "train", "c": "val"}.items():
        wnids = WNIDS[split][:2]
        numbers = {wnid: 40 + i for i, wnid in enumerate(wnids)}
        files[f"{name}.pkl"] = data_labels(40, 2, 3, catname2label=numbers)
    write(tmp_path, files)
    found = plan(tmp_path, verify_counts=False)
    assert classes(found) == [(s, wnid, 3) for s in SIZES for wnid in WNIDS[s][:2]]


@pytest.mark.parametrize("dump", [dump3, python2], ids=["python 3", "python 2"])
@pytest.mark.parametrize("val", ["val", "validation"])
def test_cache_pickles(tmp_path: Path, dump: Dump, val: str) -> None:
    names = {"train": "train", "val": val, "test": "test"}
    for split, name in names.items():
        write(tmp_path, {f"mini-imagenet-cache-{name}.pkl": cache(WNIDS[split], 600)}, dump)
    found = plan(tmp_path, 2)
    assert counts(found) == FULL
    assert [c.name for c in found.classes if c.split == "val"] == WNIDS["val"]
    assert f"val mini-imagenet-cache-{val}.pkl" in found.source
    assert "class_dict" in found.source
    # class 5 of train's 64 has the rows 5, 69, ...
    assert found.classes[5].load()[:2, 0, 0].tolist() == [[5, 5, 0], [5, 69, 0]]


def test_arrays_of_the_size_are_taken_as_they_are_and_others_resized(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    write(tmp_path, {s: {"data": noise, "labels": [FIRST[s]] * 6} for s in SIZES})
    np.testing.assert_array_equal(plan(tmp_path, 8, verify_counts=False).classes[0].load(), noise)
    smaller = plan(tmp_path, 4, verify_counts=False).classes[0].load()
    wanted = Image.fromarray(noise[2]).resize((4, 4), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(smaller[2], np.asarray(wanted))


def test_wrong_counts_are_one_message_with_all_that_is_wrong(tmp_path: Path) -> None:
    train = data_labels(0, 64, 600)
    train["data"], train["labels"] = train["data"][:-1], train["labels"][:-1]
    write(
        tmp_path,
        {"train": train, "val": data_labels(64, 15, 600), "test": data_labels(80, 20, 600)},
    )
    problems = problems_of(plan, tmp_path)
    remedy = "get the files again, or set data.source.verify_counts: false to take what is there"
    assert problems == [
        f"{tmp_path / 'train'}: split train has 38,399 images, mini-ImageNet has 38,400; {remedy}",
        f"{tmp_path / 'train'}: split train, class train-063 has 599 images, must have 600;"
        f" {remedy}",
        f"{tmp_path / 'val'}: split val has 15 classes, mini-ImageNet has 16; {remedy}",
        f"{tmp_path / 'val'}: split val has 9,000 images, mini-ImageNet has 9,600; {remedy}",
    ]
    assert counts(plan(tmp_path, 2, verify_counts=False))[1] == (15, 9000)


def test_a_missing_split_and_two_files_of_one_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"train": data_labels(0, 64, 600), "test": data_labels(80, 20, 600)})
    write(tmp_path, {"copy": data_labels(80, 20, 600)})
    missing, twice = problems_of(plan, tmp_path)
    assert f"{tmp_path} holds no file of split val of mini-ImageNet (16 classes)" in missing
    assert "train (64 classes, 38400 images)" in missing
    assert twice == f"{tmp_path / 'copy'} and {tmp_path / 'test'}: each holds split test of" + (
        " mini-ImageNet; keep one"
    )


def test_all_broken_files_are_named(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch ran",)

    write(
        tmp_path,
        {
            "a.pkl": {"data": np.zeros((3, 2, 2, 3), np.uint8), "labels": [1, 2]},
            "b.pkl": {"data": np.zeros((2, 2, 2, 3), np.float32), "labels": [1, 2]},
            "c.pkl": {"data": np.zeros((2, 2, 2), np.uint8), "labels": [1, 2]},
            "d.pkl": {"data": [1, 2], "labels": [1, 2]},
            "e.pkl": {"data": np.zeros((2, 2, 2, 3), np.uint8), "labels": ["a", "b"]},
            "f.pkl": {"image_data": np.zeros((2, 2, 2, 3), np.uint8), "class_dict": {"a": [0, 2]}},
            "g.pkl": {"image_data": np.zeros((2, 2, 2, 3), np.uint8), "class_dict": {"a": [0, 0]}},
        },
    )
    found = problems_of(plan, tmp_path)
    says = ["3 images and 2 labels", "float32", "(2, 2, 2)", "a list, must be one array"]
    says += ["no whole numbers", "rows that are not there", "or a row twice"]
    assert len(found) == len(says)
    for name, text, problem in zip("abcdefg", says, found, strict=True):
        assert problem.startswith(f"{tmp_path / name}.pkl: ")
        assert text in problem
    write(tmp_path, {"h.pkl": Bomb(), "i.pkl": 1})
    (tmp_path / "i.pkl").write_bytes(b"\x80\x04]")
    refused = [problem for problem in problems_of(plan, tmp_path) if "/h.pkl" in problem]
    assert "posix.system" in refused[0]
    assert any("i.pkl: is not a whole pickle" in problem for problem in problems_of(plan, tmp_path))


def write_ravi(folder: Path, classes: int, images: int) -> None:
    """``images/`` and CSVs with misleading names."""
    for table, split in {"a.csv": "val", "train.csv": "test", "z.csv": "train"}.items():
        lines = ["filename,label"]
        for wnid in WNIDS[split][:classes]:
            for number in range(1, images + 1):
                path = save_halves(folder / "images" / f"{wnid}{number:08d}.jpg", quality=100)
                lines.append(f"{path.name},{wnid}")
        (folder / table).write_text("\n".join(lines) + "\n")


def test_images_and_csvs(tmp_path: Path) -> None:
    write_ravi(tmp_path, 2, 3)
    found = plan(tmp_path, 8, verify_counts=False)
    assert counts(found) == [(2, 6)] * 3
    assert "images and CSVs (Ravi" in found.source
    assert "val a.csv, test train.csv" in found.source
    assert found.classes[0].name == WNIDS["train"][0]
    # the whole width is squeezed into the square: the left half is white
    image = found.classes[0].load()[0]
    assert image.shape == (8, 8, 3)
    assert image[:, :3].min() > 240
    assert image[:, 5:].max() < 15


def test_a_missing_image_and_a_broken_line_are_named(tmp_path: Path) -> None:
    write_ravi(tmp_path, 2, 2)
    gone = tmp_path / "images" / f"{WNIDS['train'][0]}00000001.jpg"
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name}: does not exist; mend the path"):
        plan(tmp_path, verify_counts=False).classes[0].load()
    with (tmp_path / "z.csv").open("a") as file:
        file.write("only-a-name.jpg\n")
    assert problems_of(plan, tmp_path)[0].startswith(
        f"{tmp_path / 'z.csv'}:6: must give filename and"
    )


@pytest.mark.parametrize("inside", ["", "train", "ILSVRC/Data/CLS-LOC/train"])
def test_class_folders_of_ilsvrc(tmp_path: Path, inside: str) -> None:
    for split, files in ilsvrc_files().items():
        for wnid in WNIDS[split][:2]:
            for name in (*files[wnid][:3], f"{wnid}_999999.JPEG"):  # the last is not listed
                save_halves(tmp_path / inside / wnid / name, format="JPEG")
    save_halves(tmp_path / inside / "n99999999" / "n99999999_1.JPEG")
    found = plan(tmp_path, 8, verify_counts=False)
    assert counts(found) == [(2, 6)] * 3
    assert "class folders of ILSVRC 2012" in found.source
    assert found.classes[1].load().shape == (3, 8, 8, 3)
    assert "has 2 classes, mini-ImageNet has 64" in problems_of(plan, tmp_path)[0]


def test_the_packages_list_is_the_published_one() -> None:
    path = LISTS / "mini_imagenet_images.csv.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with lzma.open(path, "rt") as file:
        rows = [tuple(row) for row in csv.reader(file)][1:]
    own = [
        (split, wnid, name)
        for split, classes in ilsvrc_files().items()
        for wnid, names in classes.items()
        for name in names
    ]
    assert len(own) == 60_000
    assert sorted(own) == sorted(rows)
    wnids = json.loads((LISTS / "mini_imagenet_wnids.json").read_text())
    assert {split: list(classes) for split, classes in ilsvrc_files().items()} == wnids
