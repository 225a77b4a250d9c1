"""CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018): CIFAR-100 in few-shot splits.

Both consist of all 60,000 images, 32x32: 100 classes of 600. Two forms:

- pickles of ``data`` and ``labels``, as MetaOptNet distributes them. The labels of FC100 are the
  original numbers of the classes (alphabetical), which tells the splits and the classes' names;
  of its val and test, both of 20 classes, nothing else would. Where labels count from 0 instead,
  the files' names decide between these two.
- CIFAR-100 itself for Python, as an archive or unpacked: the class lists of this package divide
  it. Images of its training part come first in each class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS, Split
from raymaml.config.sources import CifarFsSource, Fc100Source
from raymaml.data.importers.benchmark import (
    Benchmark,
    Images,
    choose,
    in_order,
    integers,
    origin,
    plan_classes,
    resized,
    verify,
)
from raymaml.data.importers.labelled_pickles import labelled_pickles, texts_of, with_text_keys
from raymaml.data.importers.pickles import load_pickle
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.data.importers.stored import Scratch, StoredArray
from raymaml.data.importers.trees import Tree, find_tree

LICENCE = "none stated (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html)"
TITLES = {
    "cifar-fs": "CIFAR-FS (Bertinetto et al. 2019)",
    "fc100": "FC100 (Oreshkin et al. 2018)",
}
_PARTS = ("train", "test")
_PIXELS = 3 * 32 * 32


def plan_cifar(source: CifarFsSource | Fc100Source, size: int, scratch: Scratch) -> ImportPlan:
    """Find the three splits in ``source.path``: pickles first, then CIFAR-100 itself.

    Raises:
        UserError: a file is damaged, a split is missing, or classes or images are.
    """
    facts = benchmark(source.kind)
    files = labelled_pickles(source.path, scratch) if source.path.is_dir() else []
    if files:
        found = choose(files, facts, source.path)
        places: Mapping[Split, str] = {split: file.name for split, file in found.items()}
        named = {
            split: replace(f, class_names=_names(f.labels, split, source.kind))
            for split, f in found.items()
        }
        classes, form = plan_classes(named, facts, size), origin(found)
    else:
        tree = find_tree(source.path, ("meta", *_PARTS), scratch)
        if tree is None:
            raise UserError(
                f"data.source.path: {source.path} holds neither pickles of data and labels nor"
                " CIFAR-100 (train, test and meta; cifar-100-python.tar.gz at"
                " https://www.cs.toronto.edu/~kriz/cifar.html)"
            )
        places = dict.fromkeys(SPLITS, tree.name)
        classes = _from_cifar100(tree, splits_of(source.kind), size, scratch)
        form = "CIFAR-100 for Python and the published class lists"
    if source.verify_counts:
        verify(classes, facts, places)
    return ImportPlan(
        source=f"{TITLES[source.kind]} from {form}",
        licence=LICENCE,
        num_channels=3,
        classes=classes,
    )


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
    splits = splits_of(kind)
    names = {split: [name for name, own in splits.items() if own == split] for split in SPLITS}
    number_of = {name: number for number, name in enumerate(splits)}
    numbers = {split: [number_of[name] for name in own] for split, own in names.items()}
    return Benchmark(
        title=TITLES[kind].partition(" (")[0],
        num_classes={split: len(own) for split, own in numbers.items()},
        images_per_class=600,
        names=names,
        labels=numbers if kind == "fc100" else {},
    )


def _names(labels: NDArray[np.int64], split: Split, kind: str) -> dict[int, str]:
    """Name the labels where they are the original ones."""
    own = benchmark(kind).labels.get(split, ())
    return dict(enumerate(splits_of(kind))) if set(labels.tolist()) <= set(own) else {}


def _from_cifar100(
    tree: Tree, splits: Mapping[str, Split], size: int, scratch: Scratch
) -> tuple[PlannedClass, ...]:
    """Divide the 100 classes of CIFAR-100."""
    names = texts_of(_read(tree, "meta", scratch).get("fine_label_names"))
    if sorted(names) != sorted(splits):
        raise UserError(f"{tree.name}/meta: does not name the 100 classes of CIFAR-100")
    parts = [_part(tree, part, scratch) for part in _PARTS]
    classes = []
    for label, name in enumerate(names):
        own = [(pixels, np.flatnonzero(labels == label)) for pixels, labels in parts]
        count = sum(len(rows) for _, rows in own)
        read = partial(_load, own, size)
        classes.append(PlannedClass(name=name, split=splits[name], count=count, read=read))
    return in_order(planned for planned in classes if planned.count)


def _part(tree: Tree, part: str, scratch: Scratch) -> tuple[StoredArray, NDArray[np.int64]]:
    """Read train or test: pixels [n, 3 * 32 * 32], planes of red, green and blue, and labels."""
    content = _read(tree, part, scratch)
    labels, pixels = integers(content.get("fine_labels", [])), content.get("data")
    if labels is None or not isinstance(pixels, StoredArray) or pixels.dtype != np.uint8:
        raise UserError(f"{tree.name}/{part}: holds no data and fine_labels of CIFAR-100")
    if pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{tree.name}/{part}: data are {pixels.shape}, must be ({len(labels)}, {_PIXELS})"
        )
    return pixels, labels


def _read(tree: Tree, file: str, scratch: Scratch) -> dict[str, Any]:
    name = f"{tree.name}/{file}"
    content = with_text_keys(load_pickle(name, tree.blob(file), scratch))
    if not isinstance(content, dict):
        raise UserError(f"{name}: is a {type(content).__name__}, must be a dict; get it again")
    return content


def _load(own: list[tuple[StoredArray, NDArray[np.int64]]], size: int, part: slice) -> Images:
    planes = np.concatenate([pixels.rows(rows) for pixels, rows in own])[part]  # of 3 kB each
    return resized(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), size)
