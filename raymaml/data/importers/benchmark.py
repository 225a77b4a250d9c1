"""Published benchmarks: which file is which split, and whether nothing is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import Mistake, UserError, gathered
from raymaml.config.data_sources import BenchmarkSource
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.images import Images, Transform, decode_files
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
    """Of each split that has files, in the order of the bank."""
    num_images: Mapping[Split, int] = field(default_factory=dict)
    images_per_class: int | None = None
    """Numbers of images, if they are published."""
    names: Mapping[Split, Collection[str]] = field(default_factory=dict)
    labels: Mapping[Split, Collection[int]] = field(default_factory=dict)
    """Names and integer labels of the classes of each split, where files carry them."""
    label_names: Mapping[int, str] = field(default_factory=dict)
    """Names of ``labels``, for files that carry these but no names."""
    label_digits: int = 3
    """Of a label in the name of a class that the benchmark does not name."""


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


def listed_files(
    files: Mapping[int, Sequence[Path]], transform: Callable[[int], Transform], **facts: Any
) -> LabelledFile:
    """Take image files by label for the rows of one file.

    Args:
        files: those of each label.
        transform: returns how an image becomes one of a size.
        **facts: the other fields of ``LabelledFile``.
    """
    labels = sorted(files)
    paths = [path for label in labels for path in files[label]]

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return decode_files([paths[row] for row in rows.tolist()], transform(size))

    counts = [len(files[label]) for label in labels]
    return LabelledFile(labels=np.repeat(np.array(labels, np.int64), counts), load=load, **facts)


def recognise(file: LabelledFile, benchmark: Benchmark) -> Split | None:
    """Return the split that the content of a file shows; None for none (train and val in one).

    The first of these that decides: names of its classes; a number of classes that only one split
    has; labels that only one split has, unless they just count from 0; and then the file's name.
    """
    numbers = set(np.unique(file.labels).tolist())
    names = {file.class_names[n] for n in numbers if n in file.class_names}
    if names and names <= set().union(*benchmark.names.values()):
        return _the_only(benchmark.names, names.issubset)
    if by_size := _the_only(benchmark.num_classes, lambda size: size == len(numbers)):
        return by_size
    by_label = _the_only(benchmark.labels, numbers.issubset)
    if by_label and numbers != set(range(len(numbers))):
        return by_label
    return _split_in_name(file.name) or by_label


def _the_only(facts: Mapping[Split, Any], fits: Callable[[Any], bool]) -> Split | None:
    found = [split for split, fact in facts.items() if fits(fact)]
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
    there = "; ".join(
        f"{file.name} ({len(np.unique(file.labels))} classes, {len(file.labels)} images)"
        for file in files
    )
    split_of = [recognise(file, benchmark) for file in files]
    chosen: dict[Split, LabelledFile] = {}
    with gathered() as mistakes:
        for split, num_classes in benchmark.num_classes.items():
            own = [file for file, its in zip(files, split_of, strict=True) if its == split]
            sizes = [len(file.labels) for file in own]
            published = benchmark.num_images.get(split)
            wanted = published if published in sizes else max(sizes, default=0)
            best = [file for file in own if len(file.labels) == wanted]
            if len(best) == 1:
                chosen[split] = best[0]
            elif best:
                names = " and ".join(file.name for file in best)
                mistakes.append(f"{names}: each holds split {split} of {benchmark.title}; keep one")
            else:
                mistakes.add(
                    f"data.source.path: {folder} holds no file of split {split} of"
                    f" {benchmark.title} ({num_classes} classes); it holds"
                    f" {there or 'no images with labels'}",
                    f"where the numbers of classes differ, call the file {split}",
                )
    return chosen


def divided(file: LabelledFile, splits: Mapping[int, Split]) -> dict[Split, LabelledFile]:
    """Divide a file of all classes by the split of each label, as if each split had its own."""

    def part(split: Split) -> LabelledFile:
        own = np.flatnonzero(np.isin(file.labels, [n for n, its in splits.items() if its == split]))
        return replace(
            file,
            labels=file.labels[own],
            load=lambda rows, size: file.load(own[rows], size),
        )

    return {split: part(split) for split in SPLITS}


def plan_files(
    chosen: Mapping[Split, LabelledFile], benchmark: Benchmark, source: BenchmarkSource, size: int
) -> ImportPlan:
    """Plan the classes of the file of each split; check their numbers if ``source`` asks for it.

    Raises:
        UserError: numbers of classes or images are wrong.
    """
    classes = in_order(
        PlannedClass(
            name=_name(split, label, file, benchmark),
            split=split,
            images=np.flatnonzero(file.labels == label),
            read=partial(_read, file, size),
        )
        for split, file in chosen.items()
        for label in np.unique(file.labels).tolist()
    )
    if source.verify_counts:
        _verify(classes, benchmark, chosen)
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
    if name and benchmark.names:
        return name
    return f"{split}-{label:0{benchmark.label_digits}d} {name}".rstrip()


def _read(file: LabelledFile, size: int, rows: NDArray[np.int64]) -> Images:
    try:
        return file.load(rows, size)
    except EOFError as error:
        raise UserError(
            f"{file.name}: changed while it was read ({error})", remedy="start again"
        ) from None


def _verify(
    classes: Sequence[PlannedClass], benchmark: Benchmark, files: Mapping[Split, LabelledFile]
) -> None:
    """Compare classes and images of each split with the published numbers.

    Raises:
        UserError: listing every number that is wrong.
    """
    title, each = benchmark.title, benchmark.images_per_class
    with gathered() as mistakes:
        for split, wanted in benchmark.num_classes.items():
            counts = {c.name: c.count for c in classes if c.split == split}
            images, total = benchmark.num_images.get(split), sum(counts.values())
            where = f"{files[split].name}: split {split}"
            wrong = []
            if len(counts) != wanted:
                wrong.append(f"{where} has {len(counts)} classes, {title} has {wanted}")
            if images not in (None, total):
                wrong.append(f"{where} has {total:,} images, {title} has {images:,}")
            for name, count in counts.items():
                if each not in (None, count):
                    wrong.append(f"{where}, class {name} has {count} images, must have {each}")
            mistakes += [Mistake(problem, KEEP_ANYWAY) for problem in wrong]
