"""tiered-ImageNet (Ren et al. 2018): 351/97/160 classes, 779,165 images of 84x84.

Two forms, each a file of images and a pickle of labels a split:

- pickles of PNG files, as Ren et al. published it: a list of uint8 arrays [n] or [n, 1], and
  ``label_specific`` beside the superclass in ``label_general``. cv2 took its own BGR arrays for
  encoding, so the PNG files are ordinary: their channels are red, green, blue for any decoder but
  cv2's, which gives BGR again.
- npz files, ``images`` uint8 [n, 84, 84, 3], and ``labels``, as MetaOptNet (Lee et al. 2019)
  distributes it: made from the former with cv2, so the channels are **blue, green, red**. They
  are turned round here. (MetaOptNet itself does not.)

The number of images decides which labels go with them, and the name where several numbers agree.
The number of classes decides the split, then the range of the labels (0-350, 351-447, 448-607), and
the name only where both are ambiguous. Images are read class by class, in bounded memory (measured:
an index of 448,695 PNG files in a pickle takes 0.2 to 0.4 GB).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import Mistakes, UserError, gathered
from raymaml.config.data_sources import TieredImageNetSource
from raymaml.data.formats.npz import NpzArray, open_npz
from raymaml.data.formats.spool import Blob, StoredArray
from raymaml.data.importers.benchmark import (
    IMAGENET_LICENCE,
    Benchmark,
    LabelledFile,
    choose,
    plan_files,
)
from raymaml.data.importers.images import Images, decode, resized, squashed
from raymaml.data.importers.labelled_pickles import (
    files_in,
    labels_of,
    pickles_in,
    require_pixels,
    texts_of,
)
from raymaml.data.importers.plan import ImportPlan

BENCHMARK = Benchmark(
    title="tiered-ImageNet",
    cited="(Ren et al. 2018)",
    licence=IMAGENET_LICENCE,
    num_classes={"train": 351, "val": 97, "test": 160},
    num_images={"train": 448_695, "val": 124_261, "test": 206_209},
    labels={"train": range(351), "val": range(351, 448), "test": range(448, 608)},
)
NPZ = "npz files of BGR pixels (MetaOptNet)"
PNGS = "pickles of PNG files (Ren et al.)"
LABELS = ("label_specific", "labels")
_Labels = tuple[str, NDArray[np.int64], dict[int, str]]
"""The name of a file, its labels, and their names."""


def plan_tiered_imagenet(source: TieredImageNetSource, size: int, bank: Path) -> ImportPlan:
    """Find the images and labels of the three splits in ``source.path``.

    Raises:
        UserError: a file is damaged or has no partner, a split is missing, or classes or images.
    """
    pictures = []
    labels: list[_Labels] = []
    # splits come one after the other: unpacked data of one need not outlive it
    opened = lru_cache(maxsize=1)(partial(NpzArray.open, bank=bank))
    for path in files_in(source.path):
        if zipfile.is_zipfile(path) and (array := open_npz(path, "images")):
            pictures.append(_npz(array, partial(opened, array)))
    for path, content in pickles_in(source.path):
        if isinstance(content, list):
            pictures.append(_pngs(path, content))
        elif isinstance(content, dict) and (key := next((k for k in LABELS if k in content), "")):
            names = dict(enumerate(texts_of(content.get("label_specific_str"))))
            labels.append((path.name, labels_of(str(path), content, key), names))
    with gathered() as mistakes:
        files = [file for each in pictures for file in _paired(each, labels, mistakes)]
    return plan_files(choose(files, BENCHMARK, source.path), BENCHMARK, source, size)


def _npz(array: NpzArray, opened: Callable[[], StoredArray]) -> LabelledFile:
    shape = array.without_values.shape
    count = shape[0] if shape else 0
    require_pixels(str(array.path), array.without_values, count)

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return resized(opened().rows(rows)[..., ::-1], size)  # BGR -> RGB

    return LabelledFile(name=str(array.path), labels=np.zeros(count, np.int64), load=load, form=NPZ)


def _pngs(path: Path, content: list[Any]) -> LabelledFile:
    files = [item.data if isinstance(item, StoredArray) else item for item in content]
    wrong = next((item for item in files if not isinstance(item, Blob | bytes)), None)
    if wrong is not None or not files:
        raise UserError(
            f"{path}: is a list of {type(wrong).__name__}, must be of PNG files as arrays of bytes"
        )

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return decode(
            (f"{path}: image {row}", partial(files.__getitem__, row), squashed(size))
            for row in rows.tolist()
        )

    labels = np.zeros(len(files), np.int64)
    return LabelledFile(name=str(path), labels=labels, load=load, form=PNGS)


def _paired(
    pictures: LabelledFile, labels: Sequence[_Labels], mistakes: Mistakes
) -> list[LabelledFile]:
    """Give a file of images the labels that are as many, of the most similar name."""
    count = len(pictures.labels)
    own = [each for each in labels if len(each[1]) == count]
    if not own:
        there = ", ".join(f"{name} {len(values)}" for name, values, _ in labels)
        mistakes.append(
            f"{pictures.name}: holds {count} images, but no pickle holds as many labels (there are"
            f" {there or 'none'}); get both again"
        )
        return []
    # the labels whose name begins with most of the same letters
    alike = [len(commonprefix([Path(pictures.name).name, name])) for name, *_ in own]  # noqa: RUF071
    _, values, names = own[alike.index(max(alike))]
    return [replace(pictures, labels=values, class_names=names)]
