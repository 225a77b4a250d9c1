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
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError, gathered
from raymaml.config.sources import TieredImageNetSource
from raymaml.data.formats.npz import NpzArray, open_npz
from raymaml.data.formats.spool import Blob, StoredArray
from raymaml.data.importers.benchmark import (
    IMAGENET_LICENCE,
    Benchmark,
    LabelledFile,
    plan_files,
)
from raymaml.data.importers.images import Images, decode, image_bytes, resized, squashed
from raymaml.data.importers.labelled_pickles import (
    files_in,
    integers,
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


class _Pictures(NamedTuple):
    """The images of one file, still without labels."""

    path: Path
    num_images: int
    load: Callable[[NDArray[np.int64], int], Images]
    form: str


class _Labels(NamedTuple):
    """The labels of one file, still without images."""

    path: Path
    values: NDArray[np.int64]
    names: dict[int, str]


def plan_tiered_imagenet(source: TieredImageNetSource, size: int, bank: Path) -> ImportPlan:
    """Find the images and labels of the three splits in ``source.path``.

    Raises:
        UserError: a file is damaged or has no partner, a split is missing, or classes or images.
    """
    return plan_files(_paired(*_read(source.path, bank)), BENCHMARK, source, size)


def _read(folder: Path, bank: Path) -> tuple[list[_Pictures], list[_Labels]]:
    pictures, labels = [], []
    # splits come one after the other: unpacked data of one need not outlive it
    opened = lru_cache(maxsize=1)(partial(NpzArray.open, bank=bank))
    for path in files_in(folder):
        if zipfile.is_zipfile(path) and (array := open_npz(path, "images")):
            pictures.append(_npz(array, partial(opened, array)))
    for path, content in pickles_in(folder):
        if isinstance(content, list):
            pictures.append(_pngs(path, content))
        elif isinstance(content, dict) and {"labels", "label_specific"} & content.keys():
            labels.append(_labels(path, content))
    return pictures, labels


def _npz(array: NpzArray, opened: Callable[[], StoredArray]) -> _Pictures:
    count = array.shape[0] if array.shape else 0
    require_pixels(str(array.path), StoredArray(b"", array.dtype, array.shape), count)

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return resized(opened().rows(rows)[..., ::-1], size)  # BGR -> RGB

    return _Pictures(array.path, count, load, NPZ)


def _pngs(path: Path, content: list[Any]) -> _Pictures:
    files = [item.data if isinstance(item, StoredArray) else item for item in content]
    wrong = next((item for item in files if not isinstance(item, Blob | bytes)), None)
    if wrong is not None or not files:
        raise UserError(
            f"{path}: is a list of {type(wrong).__name__}, must be of PNG files as arrays of bytes"
        )

    def load(rows: NDArray[np.int64], size: int) -> Images:
        return decode(
            (f"{path}: image {row}", partial(image_bytes, files[row]), squashed(size))
            for row in rows.tolist()
        )

    return _Pictures(path, len(files), load, PNGS)


def _labels(path: Path, content: dict[str, Any]) -> _Labels:
    key = "label_specific" if "label_specific" in content else "labels"
    values = integers(content[key])
    if values is None:
        raise UserError(f"{path}: its {key} are no whole numbers", remedy="get the file again")
    names = dict(enumerate(texts_of(content.get("label_specific_str"))))
    return _Labels(path, values, names)


def _paired(pictures: Iterable[_Pictures], labels: Sequence[_Labels]) -> list[LabelledFile]:
    """Give each file of images the labels that are as many, of the most similar name."""
    paired = []
    with gathered() as mistakes:
        for path, count, load, form in pictures:
            own = [candidate for candidate in labels if len(candidate.values) == count]
            if not own:
                there = ", ".join(f"{label.path.name} {len(label.values)}" for label in labels)
                mistakes.append(
                    f"{path}: holds {count} images, but no pickle holds as many labels (there are"
                    f" {there or 'none'}); get both again"
                )
                continue
            # the labels whose name begins with most of the same letters
            alike = [len(commonprefix([path.name, each.path.name])) for each in own]  # noqa: RUF071
            best = own[alike.index(max(alike))]
            file = LabelledFile(
                name=str(path), labels=best.values, load=load, form=form, class_names=best.names
            )
            paired.append(file)
    return paired
