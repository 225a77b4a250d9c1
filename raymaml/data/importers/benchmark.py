"""Published benchmarks: which file is which split, and whether nothing is missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.plan import PlannedClass
from raymaml.data.importers.stored import StoredArray
from raymaml.data.sampling import listed

IMAGENET_LICENCE = "ImageNet terms of access: non-commercial research and education only"
KEEP_ANYWAY = "get the files again, or set data.source.verify_counts: false to take what is there"

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is published about a data set: sizes, and how classes tell their split."""

    title: str
    num_classes: Mapping[Split, int]
    num_images: Mapping[Split, int] | None = None
    images_per_class: int | None = None
    names: Mapping[Split, Collection[str]] = field(default_factory=dict)
    labels: Mapping[Split, Collection[int]] = field(default_factory=dict)
    """Names and integer labels of the classes of each split, where files carry them."""

    def images_of(self, split: Split) -> int | None:
        """Return the number of images of ``split``, if it is published."""
        if self.num_images is not None:
            return self.num_images[split]
        each = self.images_per_class
        return None if each is None else each * self.num_classes[split]


@dataclass(frozen=True, kw_only=True)
class LabelledFile:
    """Images of one file with an integer label each, and names of the labels where it has them."""

    name: str
    """For messages: the path."""
    labels: NDArray[np.int64]  # [n]
    load: Callable[[NDArray[np.int64], int], Images]
    """Reads the images of row numbers at a size: [len(rows), size, size, 3]."""
    form: str
    """For the report: what kind of file this is."""
    class_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def classes(self) -> dict[int, NDArray[np.int64]]:
        """The rows of each label, both ascending."""
        order = np.argsort(self.labels, kind="stable")
        labels, starts = np.unique(self.labels[order], return_index=True)
        return dict(zip(labels.tolist(), np.split(order, starts[1:]), strict=True))


def recognise(file: LabelledFile, benchmark: Benchmark) -> Split | None:
    """Tell the split of a file from its content; None is none of the three (train and val in one).

    The first of these that decides: names of its classes; a number of classes that only one split
    has; labels that only one split has, unless they just count from 0; and, since content then
    cannot tell, the file's name.
    """
    numbers = np.unique(file.labels).tolist()
    names = {file.class_names[n] for n in numbers if n in file.class_names}
    known = set().union(*benchmark.names.values())
    if names and names <= known:
        return _the_only(split for split in SPLITS if names <= set(benchmark.names[split]))
    sized = [split for split in SPLITS if benchmark.num_classes[split] == len(numbers)]
    if len(sized) == 1:
        return sized[0]
    labelled = [split for split in benchmark.labels if set(numbers) <= set(benchmark.labels[split])]
    by_label = _the_only(labelled)
    if by_label and numbers != list(range(len(numbers))):
        return by_label
    return _split_in_name(file.name) or by_label


def _the_only(splits: Iterable[Split]) -> Split | None:
    found = list(splits)
    return found[0] if len(found) == 1 else None


def _split_in_name(name: str) -> Split | None:
    """Tell the split from the last word of a file's name: ``train_phase_val`` is no val split."""
    stem = name.rsplit("/", 1)[-1].lower()
    words = re.findall(r"train_phase_[a-z]+|trainval|train|val|test", stem)
    last = "train" if words and words[-1] == "train_phase_train" else (words or [""])[-1]
    return next((split for split in SPLITS if split == last), None)


def choose(
    files: Sequence[LabelledFile], benchmark: Benchmark, folder: object
) -> dict[Split, LabelledFile]:
    """Find the file of each split.

    Several files may hold images of the same classes (further images of the training classes are
    distributed for plain classification): the one with the published number of images is meant,
    or else the largest.

    Raises:
        UserError: a split has no file, or several equally good ones.
    """
    found: dict[Split, list[LabelledFile]] = defaultdict(list)
    for file in files:
        if split := recognise(file, benchmark):
            found[split].append(file)
    chosen: dict[Split, LabelledFile] = {}
    problems = []
    for split in SPLITS:
        best = _best(found[split], benchmark.images_of(split))
        if len(best) == 1:
            chosen[split] = best[0]
        elif best:
            names = " and ".join(file.name for file in best)
            problems.append(f"{names}: each holds split {split} of {benchmark.title}; keep one")
        else:
            there = "; ".join(map(_describe, files)) or "no images with labels"
            problems.append(
                f"data.source.path: {folder} holds no file of split {split} of {benchmark.title}"
                f" ({benchmark.num_classes[split]} classes); it holds {there}"
            )
    if problems:
        raise UserError(*problems)
    return chosen


def _best(files: Sequence[LabelledFile], published: int | None) -> list[LabelledFile]:
    exact = [file for file in files if len(file.labels) == published]
    largest = max((len(file.labels) for file in files), default=0)
    return exact or [file for file in files if len(file.labels) == largest]


def _describe(file: LabelledFile) -> str:
    return f"{file.name} ({len(np.unique(file.labels))} classes, {len(file.labels)} images)"


def origin(chosen: Mapping[Split, LabelledFile]) -> str:
    """Say which kind of files was recognised, and which file is which split."""
    forms = sorted({file.form for file in chosen.values()})
    places = ", ".join(f"{split} {Path(file.name).name}" for split, file in chosen.items())
    return f"{' and '.join(forms)}: {places}"


def plan_classes(
    chosen: Mapping[Split, LabelledFile], benchmark: Benchmark, size: int
) -> tuple[PlannedClass, ...]:
    """Plan the classes of all splits, by split and name.

    Where names are no part of the benchmark, split and label go before them: neither labels nor
    names (two classes of ImageNet are called "crane") need be unique over files.
    """
    classes = []
    for split, file in chosen.items():
        for label, rows in file.classes.items():
            name, number = file.class_names.get(label, ""), f"{split}-{label:03d}"
            classes.append(
                PlannedClass(
                    name=name if name and benchmark.names else f"{number} {name}".rstrip(),
                    split=split,
                    count=len(rows),
                    read=partial(_load, file, rows, size),
                )
            )
    return in_order(classes)


def in_order(classes: Iterable[PlannedClass]) -> tuple[PlannedClass, ...]:
    """Sort by split (train, val, test), then name."""
    places = {str(split): place for place, split in enumerate(SPLITS)}
    return tuple(sorted(classes, key=lambda c: (places[c.split], c.name)))


def _load(file: LabelledFile, rows: NDArray[np.int64], size: int, part: slice) -> Images:
    try:
        return file.load(rows[part], size)
    except EOFError as error:
        raise UserError(f"{file.name}: changed while it was read ({error}); start again") from None


def verify(
    classes: Sequence[PlannedClass], benchmark: Benchmark, places: Mapping[Split, object]
) -> None:
    """Compare classes and images of each split with the published numbers.

    ``places`` says in which file or folder each split was found.

    Raises:
        UserError: listing every number that is wrong.
    """
    problems = []
    for split in SPLITS:
        counts = {c.name: c.count for c in classes if c.split == split}
        wanted, images = benchmark.num_classes[split], benchmark.images_of(split)
        where, title = f"{places[split]}: split {split}", benchmark.title
        if len(counts) != wanted:
            problems.append(f"{where} has {len(counts)} classes, {title} has {wanted}")
        if images is not None and sum(counts.values()) != images:
            total = sum(counts.values())
            problems.append(f"{where} has {total:,} images, {title} has {images:,}")
        if (each := benchmark.images_per_class) is not None:
            problems += [
                f"{where}, class {name} has {count} images, must have {each}"
                for name, count in counts.items()
                if count != each
            ]
    if problems:
        raise UserError(*listed([f"{problem}; {KEEP_ANYWAY}" for problem in problems]))


def pixels_problem(name: str, images: object, num_labels: int) -> str | None:
    """Say what is wrong with ``images`` as uint8 [num_labels, H, W, 3]; None when nothing is."""
    if not isinstance(images, StoredArray):
        return f"{name}: its images are a {type(images).__name__}, must be one array"
    is_rgb = len(images.shape) == 4 and images.shape[3] == 3 and min(images.shape[1:3]) > 0
    if images.dtype != np.uint8 or not is_rgb:
        return f"{name}: its images are {images.dtype} {images.shape}, must be uint8 (n, H, W, 3)"
    if images.shape[0] != num_labels:
        return f"{name}: holds {images.shape[0]} images and {num_labels} labels; get it again"
    return None


def integers(values: Any) -> NDArray[np.int64] | None:
    """Return a list or array of whole numbers as an array [n]; None when it is none."""
    try:
        if isinstance(values, StoredArray):
            array = values.read() if values.dtype.kind in "iu" else np.empty(0)
        else:
            # numpy would unfold lists in lists, which may stand for more than fits into memory
            plain = isinstance(values, list | tuple) and all(
                isinstance(value, int | np.integer) for value in values
            )
            array = np.array(values) if plain else np.empty(0)
    except ValueError:  # a shape that no array can have
        return None
    array = array.reshape(-1)
    if array.dtype.kind not in "iu" or not array.size or array.max() > np.iinfo(np.int64).max:
        return None
    return array.astype(np.int64)


def load_rows(array: StoredArray, rows: NDArray[np.int64], size: int) -> Images:
    """Read images of an array [n, H, W, 3] and scale them to ``size``; see ``resized``."""
    return resized(array.rows(rows), size)


def resized(images: Images, size: int) -> Images:
    """Scale images [n, H, W, 3] to ``size`` with Lanczos' filter; those of the size stay as is."""
    if images.shape[1:3] == (size, size):
        return images
    scaled = (
        Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS) for image in images
    )
    return np.stack([np.asarray(image) for image in scaled])
