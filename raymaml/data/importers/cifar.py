"""CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018): CIFAR-100 in few-shot splits.

Both consist of all 60,000 images, 32x32: 100 classes of 600. Two forms:

- pickles of ``data`` and ``labels``, as MetaOptNet distributes them. The labels of FC100 are the
  original numbers of the classes (alphabetical), which identify the splits and the classes' names;
  nothing else in the files tells its val from its test, both of 20 classes. Where labels count from
  0 instead, the files' names decide between these two.
- CIFAR-100 itself for Python, as an archive or unpacked: the class lists of this package divide
  it. Images of its training part come first in each class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS, Split
from raymaml.config.sources import CifarFsSource, Fc100Source
from raymaml.data.formats.archives import Tree, find_tree
from raymaml.data.formats.spool import StoredArray
from raymaml.data.importers.benchmark import Benchmark, LabelledFile, plan_files
from raymaml.data.importers.images import Images, resized
from raymaml.data.importers.labelled_pickles import (
    integers,
    labelled_pickles,
    read_pickle,
    texts_of,
)
from raymaml.data.importers.plan import ImportPlan

LICENCE = "none stated (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html)"
FORM = "CIFAR-100 for Python and the published class lists"
CITED = {
    "cifar-fs": ("CIFAR-FS", "(Bertinetto et al. 2019)"),
    "fc100": ("FC100", "(Oreshkin et al. 2018)"),
}
MISSING = (
    "neither pickles of data and labels nor CIFAR-100 (train, test and meta;"
    " cifar-100-python.tar.gz at https://www.cs.toronto.edu/~kriz/cifar.html)"
)
_PARTS = ("train", "test")
_PIXELS = 3 * 32 * 32
_Part = tuple[StoredArray, NDArray[np.int64]]
"""Pixels [n, 3 * 32 * 32], planes of red, green and blue, and labels [n]."""


def plan_cifar(source: CifarFsSource | Fc100Source, size: int, bank: Path) -> ImportPlan:
    """Find the three splits in ``source.path``: pickles first, then CIFAR-100 itself.

    Raises:
        UserError: a file is damaged, a split is missing, or classes or images are.
    """
    facts = benchmark(source.kind)
    if files := labelled_pickles(source.path) if source.path.is_dir() else []:
        return plan_files(files, facts, source, size)
    tree = find_tree(source.path, ("meta", *_PARTS), bank, MISSING)
    plan = plan_files(_from_cifar100(tree, splits_of(source.kind)), facts, source, size)
    return replace(plan, source=f"{facts.title} {facts.cited} from {FORM}")


@cache
def splits_of(kind: str) -> dict[str, Split]:
    """Return the split of each of the 100 classes, by name, in alphabetical order."""
    text = resources.files(__package__).joinpath("cifar100.json").read_text(encoding="utf-8")
    lists = json.loads(text).values()
    if kind == "fc100":  # divided by superclass
        pairs = [(name, own["fc100"]) for own in lists for name in own["cifar-fs"]]
    else:
        pairs = [item for own in lists for item in own["cifar-fs"].items()]
    return dict(sorted(pairs))


@cache
def benchmark(kind: str) -> Benchmark:
    """Return the published facts of ``cifar-fs`` or ``fc100``."""
    (title, cited), splits = CITED[kind], splits_of(kind)
    names = {split: [name for name, own in splits.items() if own == split] for split in SPLITS}
    number_of = {name: number for number, name in enumerate(splits)}
    numbers = {split: [number_of[name] for name in own] for split, own in names.items()}
    return Benchmark(
        title=title,
        cited=cited,
        licence=LICENCE,
        num_classes={split: len(own) for split, own in numbers.items()},
        images_per_class=600,
        names=names,
        labels=numbers if kind == "fc100" else {},
        label_names=dict(enumerate(splits)),
    )


def _from_cifar100(tree: Tree, splits: Mapping[str, Split]) -> list[LabelledFile]:
    """Divide the 100 classes of CIFAR-100, as if each split were a file of its own."""
    names = texts_of(_read(tree, "meta").get("fine_label_names"))
    if sorted(names) != sorted(splits):
        raise UserError(f"{tree.name}/meta: does not name the 100 classes of CIFAR-100")
    parts = [_part(tree, part) for part in _PARTS]
    labels = np.concatenate([labels for _, labels in parts])
    split_of_label = np.array([splits[name] for name in names])
    rows = [np.flatnonzero(np.isin(labels, np.flatnonzero(split_of_label == s))) for s in SPLITS]
    return [
        LabelledFile(
            name=tree.name,
            labels=labels[own],
            load=partial(_load, parts, own),
            form=FORM,
            class_names=dict(enumerate(names)),
        )
        for own in rows
    ]


def _part(tree: Tree, part: str) -> _Part:
    """Read train or test."""
    content = _read(tree, part)
    labels, pixels = integers(content.get("fine_labels", [])), content.get("data")
    if labels is None or not isinstance(pixels, StoredArray) or pixels.dtype != np.uint8:
        raise UserError(f"{tree.name}/{part}: holds no data and fine_labels of CIFAR-100")
    if pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{tree.name}/{part}: data are {pixels.shape}, must be ({len(labels)}, {_PIXELS})"
        )
    return pixels, labels


def _read(tree: Tree, file: str) -> dict[str, object]:
    name = f"{tree.name}/{file}"
    content = read_pickle(name, tree.blob(file))
    if not isinstance(content, dict):
        raise UserError(
            f"{name}: is a {type(content).__name__}, must be a dict", remedy="get it again"
        )
    return content


def _load(parts: list[_Part], own: NDArray[np.int64], rows: NDArray[np.int64], size: int) -> Images:
    """Read rows, in ascending order, of those that ``own`` numbers through both parts."""
    (train, labels), (test, _) = parts
    numbers = own[rows]
    in_train = numbers < len(labels)
    planes = np.concatenate(
        [train.rows(numbers[in_train]), test.rows(numbers[~in_train] - len(labels))]
    )
    return resized(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), size)
