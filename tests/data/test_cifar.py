"""CIFAR-FS and FC100, from pickles and from CIFAR-100 itself, on small files of their forms."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers_data import LISTS
from helpers_imports import counts, import_source, pack, plan_source, problems_of, python2, unpack

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS
from raymaml.data.importers.cifar import benchmark, splits_of

FINE = list(splits_of("fc100"))  # alphabetical, so the place is the label
cifar_fs, fc100 = partial(plan_source, "cifar-fs"), partial(plan_source, "fc100")


def write_pickle(path: Path, labels: list[int], size: int = 2) -> None:
    """Image i is filled with (label, i mod 256, 9)."""
    images = np.empty((len(labels), size, size, 3), np.uint8)
    images[...] = [[[[label, i % 256, 9]]] for i, label in enumerate(labels)]
    path.write_bytes(python2({"data": images, "labels": labels}))


@pytest.mark.parametrize("kind", ["cifar-fs", "fc100"])
def test_the_packages_lists_are_the_published_ones(kind: str) -> None:
    path = LISTS / f"{kind.replace('-', '_')}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    lists = json.loads(path.read_text())
    coarse = json.loads((LISTS / "cifar_fs.json").read_text())
    pairs = [pair for own in coarse.values() for pair in own]
    for split in SPLITS:
        own = lists[split]
        wanted = (
            [fine for _, fine in own]
            if kind == "cifar-fs"
            else [fine for superclass, fine in pairs if superclass in own]
        )
        assert [n for n, s in splits_of(kind).items() if s == split] == sorted(wanted)


def test_the_lists_divide_100_classes() -> None:
    assert len(FINE) == 100
    assert sorted(FINE) == FINE
    assert Counter(splits_of("cifar-fs").values()) == {"train": 64, "val": 16, "test": 20}
    assert Counter(splits_of("fc100").values()) == {"train": 60, "val": 20, "test": 20}
    # labels are the original ones: 70 is the rose, a training class of FC100
    assert FINE[70] == "rose"
    assert 70 in benchmark("fc100").labels["train"]


def test_pickles_of_cifar_fs_are_told_by_their_number_of_classes(tmp_path: Path) -> None:
    for name, classes in {"test": 64, "a": 16, "train": 20}.items():  # misleading names
        write_pickle(tmp_path / f"{name}.pickle", [i % classes for i in range(600 * classes)])
    found = cifar_fs(tmp_path, 2)
    assert counts(found) == [(64, 38_400), (16, 9_600), (20, 12_000)]
    assert "CIFAR-FS (Bertinetto et al. 2019) from pickles of data and labels" in found.source
    assert found.source.endswith("train test.pickle, val a.pickle, test train.pickle")
    assert found.classes[66].name == "val-002"
    assert found.classes[66].load()[:2, 0, 0].tolist() == [[2, 2, 9], [2, 18, 9]]


def test_pickles_of_fc100_are_told_by_their_labels(tmp_path: Path) -> None:
    for name, split in {"val": "test", "b": "val", "test": "train"}.items():
        own = benchmark("fc100").labels[split]  # type: ignore[index]
        write_pickle(tmp_path / f"{name}.pickle", [label for label in own for _ in range(600)])
    found = fc100(tmp_path, 2)
    assert counts(found) == [(60, 36_000), (20, 12_000), (20, 12_000)]
    assert found.source.endswith("train test.pickle, val b.pickle, test val.pickle")
    for planned in found.classes[::9]:
        assert splits_of("fc100")[planned.name] == planned.split
        assert (planned.load()[:, 0, 0, 0] == FINE.index(planned.name)).all()


def test_where_labels_count_from_0_names_tell_val_from_test(tmp_path: Path) -> None:
    for split, size in {"train": 60, "val": 20, "test": 20}.items():
        write_pickle(tmp_path / f"FC100_{split}.pickle", [i % size for i in range(600 * size)])
    found = fc100(tmp_path, 2)
    assert found.source.endswith("val FC100_val.pickle, test FC100_test.pickle")
    assert found.classes[0].name == "train-000"
    # and those of another benchmark are refused
    problems = problems_of(cifar_fs, tmp_path)
    assert any("no file of split val of CIFAR-FS (16 classes)" in problem for problem in problems)


def cifar100(each: int = 2, short: bool = False) -> dict[str, bytes]:
    """train, test and meta with ``each`` images a class in both; pixel planes are told apart."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(100), each)).tolist()
    parts = {}
    for number, part in enumerate(("train", "test")):
        labels = order[:-1] if short and part == "train" else order
        planes = np.empty((len(labels), 3, 32, 32), np.uint8)
        planes[:, 0], planes[:, 1] = np.array(labels)[:, None, None], number
        planes[:, 2] = np.arange(32)[:, None]  # blue grows downwards
        parts[part] = {
            "data": planes.reshape(len(labels), -1),
            "fine_labels": labels,
            "coarse_labels": [0] * len(labels),
            "filenames": ["x.png"] * len(labels),
            "batch_label": "batch",
        }
    meta = {"fine_label_names": FINE, "coarse_label_names": ["x"]}
    return {name: python2(value) for name, value in (parts | {"meta": meta}).items()}


def write_cifar100(folder: Path, where: str, files: dict[str, bytes]) -> Path:
    """Write CIFAR-100 in one of the forms that people have; return what to name in the config."""
    if where == "folder":
        return unpack(folder, files)
    members = {f"cifar-100-python/{name}": content for name, content in files.items()}
    if where == "folder above":
        return unpack(folder, members)
    mode = {"tar": "w", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}.get(where, "w:gz")
    archive = folder / f"cifar-100-python.{where.removesuffix(' above')}"
    pack(archive, members, mode)
    return folder if "above" in where else archive


@pytest.mark.parametrize("where", ["folder", "folder above", "tar.gz above", "tar.xz"])
def test_cifar_100_is_divided_by_the_lists(tmp_path: Path, where: str) -> None:
    path = write_cifar100(tmp_path, where, cifar100())
    found = fc100(path, 32, verify_counts=False)
    assert counts(found) == [(60, 240), (20, 80), (20, 80)]
    assert "FC100 (Oreshkin et al. 2018) from CIFAR-100 for Python" in found.source
    for planned in found.classes[::11]:
        assert splits_of("fc100")[planned.name] == planned.split
        images = planned.load()
        assert images.shape == (4, 32, 32, 3)
        assert (images[..., 0] == FINE.index(planned.name)).all()
        assert images[:, 0, 0, 1].tolist() == [0, 0, 1, 1]  # train's images first
        assert images[0, :, 5, 2].tolist() == list(range(32))


def test_cifar_100_has_600_images_a_class(tmp_path: Path) -> None:
    path = write_cifar100(tmp_path, "folder", cifar100(300))
    assert counts(cifar_fs(path)) == [(64, 38_400), (16, 9_600), (20, 12_000)]
    path = write_cifar100(tmp_path, "folder", cifar100(300, short=True))
    _, problem = problems_of(cifar_fs, path)
    assert "has 599 images, must have 600" in problem


def test_what_is_not_cifar_100_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither pickles of data and labels nor CIFAR-100"):
        cifar_fs(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is not a folder or an archive"):
        cifar_fs(tmp_path / "nowhere")
    files = cifar100()
    for name, content, says in (
        ("meta", python2({"fine_label_names": ["cat"]}), "/meta: does not name the 100 classes"),
        ("train", python2({"data": 1, "fine_labels": [1]}), "/train: holds no data and fine_label"),
        ("test", python2([1]), "/test: is a list, must be a dict"),
        ("train", pickle.dumps(Path), "/train: its pickle asks for pathlib"),
        ("test", files["test"][:-1000], "/test: is not a whole pickle"),
    ):
        path = write_cifar100(tmp_path, "tar", files | {name: content})
        with pytest.raises(UserError, match=says):
            fc100(path)


def test_an_import_leaves_nothing_that_it_unpacks(tmp_path: Path) -> None:
    path = write_cifar100(tmp_path, "tar.gz", cifar100(1))
    bank = import_source("cifar-fs", path, tmp_path, 32, ways=5, verify_counts=False)
    assert bank.num_images == 200
    assert [len(bank.class_ids(split)) for split in SPLITS] == [64, 16, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "cifar-100-python.tar.gz"]
