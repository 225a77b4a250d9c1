"""Published benchmarks: which file is which split, and whether nothing is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError, gathered
from raymaml.config.schema import SPLITS, Split
from raymaml.config.sources import BenchmarkSource
from raymaml.data.importers.images import Images
from raymaml.data.importers.plan import ImportPlan, PlannedClass, in_order

IMAGENET_LICENCE = "ImageNet terms of access: non-commercial research and education only"
KEEP_ANYWAY = "get the files again, or set data.source.verify_counts: false to take what is there"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The published facts of a data set: its sizes, and the classes of each split."""

    title: str
    cited: str = ""
    """Its papers, in brackets."""
    licence: str = ""
    num_classes: Mapping[Split, int]
    num_images: Mapping[Split, int] | None = None
    images_per_class: int | None = None
    names: Mapping[Split, Collection[str]] = field(default_factory=dict)
    labels: Mapping[Split, Collection[int]] = field(default_factory=dict)
    """Names and integer labels of the classes of each split, where files carry them."""
    label_names: Mapping[int, str] = field(default_factory=dict)
    """Names of ``labels``, for files that carry these but no names."""

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
    """For the report: the kind of file."""
    class_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def classes(self) -> dict[int, NDArray[np.int64]]:
        """The rows of each label, both ascending."""
        labels = np.unique(self.labels).tolist()
        return {label: np.flatnonzero(self.labels == label) for label in labels}


def recognise(file: LabelledFile, benchmark: Benchmark) -> Split | None:
    """Return the split that the content of a file shows; None for none (train and val in one).

    The first of these that decides: names of its classes; a number of classes that only one split
    has; labels that only one split has, unless they just count from 0; and then the file's name.
    """
    numbers = np.unique(file.labels).tolist()
    names = {file.class_names[n] for n in numbers if n in file.class_names}
    if names and names <= set().union(*benchmark.names.values()):
        return _the_only(split for split in SPLITS if names <= set(benchmark.names[split]))
    sized = _the_only(split for split in SPLITS if benchmark.num_classes[split] == len(numbers))
    if sized:
        return sized
    own = benchmark.labels.items()
    by_label = _the_only(split for split, labels in own if set(numbers) <= set(labels))
    if by_label and numbers != list(range(len(numbers))):
        return by_label
    return _split_in_name(file.name) or by_label


def _the_only(splits: Iterable[Split]) -> Split | None:
    found = list(splits)
    return found[0] if len(found) == 1 else None


def _split_in_name(name: str) -> Split | None:
    """Return the split that the last word of a file's name is: ``train_phase_val`` is none."""
    stem = name.rsplit("/", 1)[-1].lower()
    words = re.findall(r"train_phase_[a-z]+|trainval|train|val|test", stem) or [""]
    last = words[-1].replace("train_phase_train", "train")
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
    split_of = [recognise(file, benchmark) for file in files]
    there = "; ".join(
        f"{file.name} ({len(np.unique(file.labels))} classes, {len(file.labels)} images)"
        for file in files
    )
    chosen: dict[Split, LabelledFile] = {}
    with gathered() as mistakes:
        for split in SPLITS:
            own = [file for file, its in zip(files, split_of, strict=True) if its == split]
            sizes = [len(file.labels) for file in own]
            published = benchmark.images_of(split)
            wanted = published if published in sizes else max(sizes, default=0)
            best = [file for file in own if len(file.labels) == wanted]
            if len(best) == 1:
                chosen[split] = best[0]
            elif best:
                names = " and ".join(file.name for file in best)
                mistakes.append(f"{names}: each holds split {split} of {benchmark.title}; keep one")
            else:
                mistakes.append(
                    f"data.source.path: {folder} holds no file of split {split} of"
                    f" {benchmark.title} ({benchmark.num_classes[split]} classes); it holds"
                    f" {there or 'no images with labels'}"
                )
    return chosen


def plan_files(
    files: Sequence[LabelledFile], benchmark: Benchmark, source: BenchmarkSource, size: int
) -> ImportPlan:
    """Plan the classes of the file of each split; check their numbers if ``source`` asks for it.

    Raises:
        UserError: a split has no file, or several, or numbers of classes or images are wrong.
    """
    chosen = choose(files, benchmark, source.path)
    classes = in_order(
        PlannedClass(
            name=_name(split, label, file, benchmark),
            split=split,
            count=len(rows),
            read=partial(_load, file, rows, size),
        )
        for split, file in chosen.items()
        for label, rows in file.classes.items()
    )
    if source.verify_counts:
        verify(classes, benchmark, {split: file.name for split, file in chosen.items()})
    forms = sorted({file.form for file in chosen.values()})
    places = ", ".join(f"{split} {Path(file.name).name}" for split, file in chosen.items())
    return ImportPlan(
        source=f"{benchmark.title} {benchmark.cited} from {' and '.join(forms)}: {places}",
        licence=benchmark.licence,
        num_channels=3,
        classes=classes,
    )


def _name(split: Split, label: int, file: LabelledFile, benchmark: Benchmark) -> str:
    """Name a class; split and label go before names that are no part of the benchmark.

    Neither labels nor such names (two classes of ImageNet are called "crane") need be unique.
    """
    names = file.class_names
    if not names and set(file.labels.tolist()) <= set(benchmark.labels.get(split, ())):
        names = benchmark.label_names
    name = names.get(label, "")
    return name if name and benchmark.names else f"{split}-{label:03d} {name}".rstrip()


def _load(file: LabelledFile, rows: NDArray[np.int64], size: int, part: slice) -> Images:
    try:
        return file.load(rows[part], size)
    except EOFError as error:
        raise UserError(
            f"{file.name}: changed while it was read ({error})", remedy="start again"
        ) from None


def verify(
    classes: Sequence[PlannedClass], benchmark: Benchmark, places: Mapping[Split, object]
) -> None:
    """Compare classes and images of each split with the published numbers.

    Args:
        classes: of all splits.
        benchmark: the published numbers.
        places: the file or folder of each split, for messages.

    Raises:
        UserError: listing every number that is wrong.
    """
    title, each = benchmark.title, benchmark.images_per_class
    with gathered() as mistakes:
        for split in SPLITS:
            counts = {c.name: c.count for c in classes if c.split == split}
            wanted, images = benchmark.num_classes[split], benchmark.images_of(split)
            where, total = f"{places[split]}: split {split}", sum(counts.values())
            wrong = []
            if len(counts) != wanted:
                wrong.append(f"{where} has {len(counts)} classes, {title} has {wanted}")
            if images not in (None, total):
                wrong.append(f"{where} has {total:,} images, {title} has {images:,}")
            for name, count in counts.items():
                if each not in (None, count):
                    wrong.append(f"{where}, class {name} has {count} images, must have {each}")
            mistakes += [f"{problem}; {KEEP_ANYWAY}" for problem in wrong]
