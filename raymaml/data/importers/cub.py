"""CUB-200-2011 (Wah et al. 2011): 200 kinds of birds, 11,788 photographs.

Read as it is distributed: ``images/``, ``images.txt`` and ``bounding_boxes.txt``, in
``CUB_200_2011.tgz`` or unpacked. Two divisions of the classes are in use and give different
accuracies, so that the config has to name one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymaml.common.errors import gathered
from raymaml.config.data_sources import CubSource
from raymaml.config.schema import Split
from raymaml.data.formats.archives import Tree, find_tree
from raymaml.data.importers.benchmark import (
    KEEP_ANYWAY,
    Benchmark,
    LabelledFile,
    divided,
    plan_files,
)
from raymaml.data.importers.images import Images, Transform, decode, squared, squashed
from raymaml.data.importers.plan import ImportPlan

NUM_CLASSES = 200
NUM_IMAGES = 11_788
LICENCE = "images of many owners, non-commercial research and education only (Wah et al. 2011)"
MISSING = (
    "no images.txt of CUB-200-2011, nor an archive with one; get CUB_200_2011.tgz at"
    " https://www.vision.caltech.edu/datasets/cub_200_2011"
)

# Class numbers of the split of Triantafillou et al. 2020 (Meta-Dataset); the others train
_VAL_OF_140 = {
    *(44, 51, 52, 55, 57, 61, 64, 66, 68, 72, 76, 80, 84, 96, 113, 121, 127, 136, 140, 145),
    *(150, 155, 159, 162, 172, 176, 178, 198, 199, 200),
}
_TEST_OF_140 = {
    *(8, 9, 15, 20, 28, 30, 35, 39, 45, 46, 82, 85, 94, 101, 103, 112, 118, 122, 128, 133),
    *(134, 137, 147, 148, 163, 168, 169, 170, 193, 194),
}
BENCHMARKS = {
    f"cub_{train}_{val}_{test}": Benchmark(
        title=f"CUB {train}/{val}/{test}",
        licence=LICENCE,
        num_classes={"train": train, "val": val, "test": test},
    )
    for train, val, test in ((100, 50, 50), (140, 30, 30))
}


def split_of(number: int, split: str) -> Split:
    """Return the split of class ``number``, 1 to 200."""
    if split == "cub_140_30_30":
        return "val" if number in _VAL_OF_140 else "test" if number in _TEST_OF_140 else "train"
    # Hilliard et al. 2018: of four, the first and third train, the second validates
    return "train" if number % 2 else "val" if number % 4 == 2 else "test"


def plan_cub(source: CubSource, size: int, bank: Path) -> ImportPlan:
    """List the images of ``images.txt`` by class.

    Raises:
        UserError: a file is missing or damaged, or classes, images or boxes are missing.
    """
    tree = find_tree(source.path, ("images.txt",), bank, MISSING)
    where = f"{tree.name}/images.txt"
    listing = {line[0]: key for key, line in sorted(_table(tree, "images.txt", 1).items())}
    boxes = _boxes(tree, listing) if source.crop_to_box else {}
    names = sorted(listing)
    with gathered() as mistakes:
        for name in names:
            if not re.match(r"[0-9]{3}", name) or not 1 <= int(name[:3]) <= NUM_CLASSES:
                mistakes.add(f"{where}: {name} is of no class 001 to 200", "get it again")

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return decode(
            (f"{tree.name}/images/{name}", partial(tree.blob, f"images/{name}"), square(name, size))
            for name in (names[row] for row in rows.tolist())
        )

    def square(name: str, size: int) -> Transform:
        return partial(_cut_out, boxes[name], size) if source.crop_to_box else squared(size)

    numbers = [int(name[:3]) for name in names]
    folders = {number: n.partition("/")[0] for number, n in zip(numbers, names, strict=True)}
    splits = {number: split_of(number, source.split) for number in folders}
    file = LabelledFile(
        name=tree.name,
        labels=np.array(numbers, np.int64),
        load=load,
        form="",
        class_names=folders,
    )
    facts = replace(BENCHMARKS[source.split], names={"train": folders.values()})
    with gathered() as mistakes:
        if source.verify_counts and len(names) != NUM_IMAGES:
            problem = f"{where}: lists {len(names):,} images, CUB-200-2011 has {NUM_IMAGES:,}"
            mistakes.add(problem, KEEP_ANYWAY)
        with mistakes.kept():
            plan = plan_files(divided(file, splits), facts, source, size)
    crop = "cut out by bounding box" if source.crop_to_box else "middle squares"
    return replace(plan, source=f"CUB-200-2011 (Wah et al. 2011), split {source.split}, {crop}")


def _table(tree: Tree, file: str, columns: int) -> dict[str, list[str]]:
    """Read a file of lines of a number and ``columns`` values."""
    text = tree.blob(file).read().decode("utf-8", "replace")
    table: dict[str, list[str]] = {}
    with gathered() as mistakes:
        for number, line in enumerate(text.splitlines(), 1):
            key, *values = line.split() or [""]
            if key and len(values) != columns:
                problem = f"{tree.name}/{file}:{number}: must hold {1 + columns} values"
                mistakes.add(problem, "mend it")
            elif key:
                table[key] = values
    return table


def _boxes(tree: Tree, listing: Mapping[str, str]) -> dict[str, list[float]]:
    """Return the box of each image: left, top, width and height, pixels."""
    file = f"{tree.name}/bounding_boxes.txt"
    boxes: dict[str, list[float]] = {}
    with gathered() as mistakes:
        table = _table(tree, "bounding_boxes.txt", 4)
        for name, key in listing.items():
            try:
                boxes[name] = [float(value) for value in table[key]]
            except KeyError:
                remedy = "get it again, or set data.source.crop_to_box: false"
                mistakes.add(f"{file}: has no box of {name}", remedy)
            except ValueError as error:
                mistakes.add(f"{file}: {error}", "get it again")
    return boxes


def _cut_out(box: list[float], size: int, image: Image.Image) -> Images:
    """Cut a box out and scale it to the square, whatever its shape."""
    left, top, width, height = box
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    part = image.crop((round(left), round(top), round(right), round(bottom)))
    return squashed(size)(part)
