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
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.config.data_sources import CifarFsSource, Fc100Source
from raymaml.config.schema import SPLITS, Split
from raymaml.data.formats.archives import Tree, find_tree
from raymaml.data.formats.spool import StoredArray
from raymaml.data.importers.benchmark import (
    Benchmark,
    LabelledFile,
    choose,
    divided,
    plan_files,
)
from raymaml.data.importers.images import Images, resized
from raymaml.data.importers.labelled_pickles import (
    labelled_pickles,
    labels_of,
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
_PIXELS = 3 * 32 * 32


def plan_cifar(source: CifarFsSource | Fc100Source, size: int, bank: Path) -> ImportPlan:
    """Find the three splits in ``source.path``: pickles first, then CIFAR-100 itself.

    Raises:
        UserError: a file is damaged, a split is missing, or classes or images are.
    """
    facts, splits = benchmark(source.kind), splits_of(source.kind)
    if files := labelled_pickles(source.path) if source.path.is_dir() else []:
        return plan_files(choose(files, facts, source.path), facts, source, size)
    file = _cifar100(find_tree(source.path, ("meta", "train", "test"), bank, MISSING), set(splits))
    by_label = {label: splits[name] for label, name in file.class_names.items()}
    plan = plan_files(divided(file, by_label), facts, source, size)
    return replace(plan, source=f"{facts.title} {facts.cited} from {FORM}")


@cache
def splits_of(kind: str) -> dict[str, Split]:
    """Return the split of each of the 100 classes, by name, in alphabetical order."""
    text = resources.files(__package__).joinpath("cifar100.json").read_text(encoding="utf-8")
    return {name: splits[kind] for name, splits in json.loads(text).items()}


@cache
def benchmark(kind: str) -> Benchmark:
    """Return the published facts of ``cifar-fs`` or ``fc100``."""
    (title, cited), splits = CITED[kind], splits_of(kind)
    names = {split: [name for name, own in splits.items() if own == split] for split in SPLITS}
    numbers = {split: [list(splits).index(name) for name in own] for split, own in names.items()}
    return Benchmark(
        title=title,
        cited=cited,
        licence=LICENCE,
        num_classes={split: len(own) for split, own in numbers.items()},
        num_images={split: 600 * len(own) for split, own in numbers.items()},
        images_per_class=600,
        names=names,
        labels=numbers if kind == "fc100" else {},
        label_names=dict(enumerate(splits)),
    )


def _cifar100(tree: Tree, classes: set[str]) -> LabelledFile:
    """Read CIFAR-100: the rows of its training part, then those of its test part."""
    names = texts_of(_read(tree, "meta").get("fine_label_names"))
    if sorted(names) != sorted(classes):
        raise UserError(f"{tree.name}/meta: does not name the 100 classes of CIFAR-100")
    (train, first), (test, second) = _part(tree, "train"), _part(tree, "test")

    def load(rows: NDArray[np.int64], size: int) -> Images:
        in_train = rows < len(first)  # rows ascend
        parts = train.rows(rows[in_train]), test.rows(rows[~in_train] - len(first))
        planes = np.concatenate(parts).reshape(-1, 3, 32, 32)
        return resized(planes.transpose(0, 2, 3, 1), size)

    return LabelledFile(
        name=tree.name,
        labels=np.concatenate([first, second]),
        load=load,
        form=FORM,
        class_names=dict(enumerate(names)),
    )


def _part(tree: Tree, part: str) -> tuple[StoredArray, NDArray[np.int64]]:
    """Read train or test: planes of red, green and blue [n, 3 * 32 * 32], and labels [n]."""
    content = _read(tree, part)
    pixels = content.get("data")
    if "fine_labels" not in content or not isinstance(pixels, StoredArray):
        raise UserError(f"{tree.name}/{part}: holds no data and fine_labels of CIFAR-100")
    labels = labels_of(f"{tree.name}/{part}", content, "fine_labels")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{tree.name}/{part}: data are {pixels.dtype} {pixels.shape}, must be uint8"
            f" ({len(labels)}, {_PIXELS})"
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
