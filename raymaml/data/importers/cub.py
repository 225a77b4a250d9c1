"""CUB-200-2011 (Wah et al. 2011): 200 kinds of birds, 11,788 photographs.

Read as it is distributed: ``images/``, ``images.txt`` and ``bounding_boxes.txt``, in
``CUB_200_2011.tgz`` or unpacked. Two divisions of the classes are in use and give different
accuracies, so that the config has to name one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from PIL import Image

from raymaml.common.errors import gathered
from raymaml.config.schema import SPLITS, Split
from raymaml.config.sources import CubSource
from raymaml.data.formats.archives import Tree, find_tree
from raymaml.data.importers.benchmark import KEEP_ANYWAY, Benchmark, verify
from raymaml.data.importers.images import (
    Images,
    Transform,
    decode,
    image_bytes,
    squared,
    squashed,
)
from raymaml.data.importers.plan import ImportPlan, PlannedClass, in_order

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
    "cub_100_50_50": Benchmark(
        title="CUB 100/50/50", num_classes={"train": 100, "val": 50, "test": 50}
    ),
    "cub_140_30_30": Benchmark(
        title="CUB 140/30/30", num_classes={"train": 140, "val": 30, "test": 30}
    ),
}

Box = tuple[float, float, float, float]
"""Left, top, width and height of a bird, pixels."""


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
    names = {key: line[0] for key, line in _table(tree, "images.txt", 1).items()}
    boxes = _boxes(tree, names) if source.crop_to_box else None
    classes = _classes(tree, names, boxes, source.split, size)
    if source.verify_counts:
        with gathered() as mistakes:
            if len(names) != NUM_IMAGES:
                mistakes.append(
                    f"{tree.name}/images.txt: lists {len(names):,} images, CUB-200-2011 has"
                    f" {NUM_IMAGES:,}; {KEEP_ANYWAY}"
                )
            verify(classes, BENCHMARKS[source.split], dict.fromkeys(SPLITS, tree.name))
    crop = "cut out by bounding box" if source.crop_to_box else "middle squares"
    return ImportPlan(
        source=f"CUB-200-2011 (Wah et al. 2011), split {source.split}, {crop}",
        licence=LICENCE,
        num_channels=3,
        classes=classes,
    )


def _table(tree: Tree, file: str, columns: int) -> dict[str, list[str]]:
    """Read a file of lines of a number and ``columns`` values."""
    text = tree.blob(file).read().decode("utf-8", "replace")
    table: dict[str, list[str]] = {}
    with gathered() as mistakes:
        for number, line in enumerate(text.splitlines(), 1):
            key, *values = line.split() or [""]
            if key and len(values) != columns:
                mistakes.add(
                    f"{tree.name}/{file}:{number}: must hold {1 + columns} values", "mend it"
                )
            elif key:
                table[key] = values
    return table


def _boxes(tree: Tree, names: Mapping[str, str]) -> dict[str, Box]:
    """Return the box of each image by the image's name."""
    file = f"{tree.name}/bounding_boxes.txt"
    boxes: dict[str, Box] = {}
    with gathered() as mistakes:
        table = _table(tree, "bounding_boxes.txt", 4)
        for key, name in names.items():
            if key not in table:
                mistakes.append(
                    f"{file}: has no box of {name}; get it again, or set"
                    " data.source.crop_to_box: false"
                )
                continue
            try:
                left, top, width, height = map(float, table[key])
                boxes[name] = left, top, width, height
            except ValueError as error:
                mistakes.append(f"{file}: {error}; get it again")
    return boxes


def _classes(
    tree: Tree, names: Mapping[str, str], boxes: Mapping[str, Box] | None, split: str, size: int
) -> tuple[PlannedClass, ...]:
    images: dict[str, list[str]] = defaultdict(list)
    with gathered() as mistakes:
        for name in names.values():
            folder = name.partition("/")[0]
            if re.match(r"[0-9]{3}", folder) and 1 <= int(folder[:3]) <= NUM_CLASSES:
                images[folder].append(name)
            else:
                problem = f"{tree.name}/images.txt: {name} is of no class 001 to 200"
                mistakes.add(problem, "get it again")
    return in_order(
        PlannedClass(
            name=name,
            split=split_of(int(name[:3]), split),
            count=len(own),
            read=partial(_load, tree, sorted(own), boxes, size),
        )
        for name, own in images.items()
    )


def _load(
    tree: Tree, names: list[str], boxes: Mapping[str, Box] | None, size: int, part: slice
) -> Images:
    return decode(
        (
            f"{tree.name}/images/{name}",
            partial(_read, tree, f"images/{name}"),
            squared(size) if boxes is None else _cut_out(boxes[name], size),
        )
        for name in names[part]
    )


def _read(tree: Tree, file: str) -> bytes:
    return image_bytes(tree.blob(file))


def _cut_out(box: Box, size: int) -> Transform:
    """Return a transform that cuts a box out and scales it to the square, whatever its shape."""
    left, top, width, height = box

    def transform(image: Image.Image) -> Images:
        right, bottom = min(left + width, image.width), min(top + height, image.height)
        part = image.crop((round(left), round(top), round(right), round(bottom)))
        return squashed(size)(part)

    return transform
