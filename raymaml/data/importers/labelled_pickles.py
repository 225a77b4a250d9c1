"""Pickles of images with labels: the two forms in which small benchmarks are handed round.

``data`` (uint8 [n, H, W, 3]) with ``labels``, as Gidaris and Komodakis 2018 and MetaOptNet (Lee
et al. 2019) wrote them; and ``image_data`` with ``class_dict`` (class name -> rows), as Ren et al.
2018. Keys may be bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError, gathered
from raymaml.data.formats.pickles import load_pickle
from raymaml.data.formats.spool import Blob, StoredArray, open_blob
from raymaml.data.importers.benchmark import LabelledFile
from raymaml.data.importers.images import resized

DATA_LABELS = "pickles of data and labels (Gidaris, MetaOptNet)"
CACHE = "cache pickles of image_data and class_dict (few-shot-ssl, torchmeta, learn2learn)"

_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"(lp", b"}q", b"]q")


def labelled_pickles(folder: Path) -> list[LabelledFile]:
    """Read the pickles of images with labels in ``folder``; others are passed over.

    Raises:
        UserError: naming every file whose images or labels cannot be used.
    """
    files: list[LabelledFile] = []
    with gathered() as mistakes:
        for path, content in pickles_in(folder):
            keys = content.keys() if isinstance(content, dict) else set()
            with mistakes.kept():
                if {"data", "labels"} <= keys:
                    files.append(_data_and_labels(str(path), content))
                elif {"image_data", "class_dict"} <= keys:
                    files.append(_image_data_and_class_dict(str(path), content))
    return files


def pickles_in(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Read every pickle of a folder.

    Raises:
        UserError: naming each file that is damaged, or asks for more than data.
    """
    with gathered() as mistakes:
        for path in files_in(folder):
            blob = open_blob(path)
            begins = blob.part(0, min(3, blob.length)).read()
            # a file of this suffix is a pickle, or should be: a damaged one is named
            if path.suffix in {".pickle", ".pkl"} or begins.startswith(_MAGIC):
                content = None
                with mistakes.kept():
                    content = read_pickle(str(path), blob)
                yield path, content


def files_in(folder: Path) -> list[Path]:
    """Return the visible files of a folder, or, where there are none, of its folders."""
    for pattern in ("*", "*/*"):
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if visible := [path for path in files if not path.name.startswith(".")]:
            return visible
    return []


def read_pickle(name: str, blob: Blob) -> Any:
    """Read a pickle as ``load_pickle`` does; the keys of a dict are text, never bytes."""
    content = load_pickle(name, blob)
    if not isinstance(content, dict):
        return content
    return {text_of(key): value for key, value in content.items()}


def text_of(value: object) -> str:
    """Return text that a pickle holds as text or as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def texts_of(values: object) -> list[str]:
    """Return a list or array of texts as a list; an empty one for anything else."""
    try:
        items = values.read().tolist() if isinstance(values, StoredArray) else values
    except ValueError:  # a shape that no array can have, or characters that are none
        return []
    if not isinstance(items, list | tuple) or not all(isinstance(i, str | bytes) for i in items):
        return []
    return list(map(text_of, items))


def labels_of(name: str, content: Mapping[str, Any], key: str) -> NDArray[np.int64]:
    """Return the labels [n] at ``key``; raises ``UserError`` where they are no whole numbers."""
    labels = _integers(content[key])
    if not len(labels):
        raise UserError(f"{name}: its {key} are no whole numbers", remedy="get the file again")
    return labels


def _integers(values: Any) -> NDArray[np.int64]:
    """Return a list or array of whole numbers as an array [n]; an empty one for anything else."""
    # numpy would unfold lists in lists, which may stand for more than fits into memory
    is_flat = isinstance(values, list | tuple) and all(
        isinstance(v, int | np.integer) for v in values
    )
    try:
        array = (
            values.read()
            if isinstance(values, StoredArray)
            else np.array(values if is_flat else 0.0)
        )
    except ValueError:  # a shape that no array can have
        array = np.array(0.0)
    fits = array.dtype.kind in "iu" and array.max(initial=0) <= np.iinfo(np.int64).max
    return array.reshape(-1).astype(np.int64) if fits else np.empty(0, np.int64)


def require_pixels(name: str, images: object, num_labels: int) -> None:
    """Check that ``images`` are stored as uint8 [num_labels, H, W, 3].

    Raises:
        UserError: naming their kind and shape.
    """
    if not isinstance(images, StoredArray):
        raise UserError(f"{name}: its images are a {type(images).__name__}, must be one array")
    is_rgb = len(images.shape) == 4 and images.shape[3] == 3 and min(images.shape[1:3]) > 0
    if images.dtype != np.uint8 or not is_rgb:
        kind = f"{images.dtype} {images.shape}"
        raise UserError(f"{name}: its images are {kind}, must be uint8 (n, H, W, 3)")
    if images.shape[0] != num_labels:
        raise UserError(
            f"{name}: holds {images.shape[0]} images and {num_labels} labels", remedy="get it again"
        )


def _data_and_labels(name: str, content: Mapping[str, Any]) -> LabelledFile:
    numbers = content.get("catname2label")
    pairs = numbers.items() if isinstance(numbers, dict) else ()
    names = {int(n): text_of(text) for text, n in pairs if isinstance(n, int | np.integer)}
    return _labelled(name, DATA_LABELS, content["data"], labels_of(name, content, "labels"), names)


def _image_data_and_class_dict(name: str, content: Mapping[str, Any]) -> LabelledFile:
    rows_of = content["class_dict"]
    if not isinstance(rows_of, dict):
        raise UserError(f"{name}: its class_dict is a {type(rows_of).__name__}, must be a dict")
    rows = {text_of(key): _integers(value) for key, value in rows_of.items()}
    names = sorted(rows)
    order = np.concatenate([np.empty(0, np.int64), *(rows[key] for key in names)])
    if not len(order) or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise UserError(
            f"{name}: its class_dict names rows that are not there, or a row twice",
            remedy="get it again",
        )
    labels = np.empty_like(order)
    labels[order] = np.repeat(np.arange(len(names)), [len(rows[key]) for key in names])
    return _labelled(name, CACHE, content["image_data"], labels, dict(enumerate(names)))


def _labelled(
    name: str, form: str, images: Any, labels: NDArray[np.int64], names: Mapping[int, str]
) -> LabelledFile:
    require_pixels(name, images, len(labels))
    return LabelledFile(
        name=name,
        labels=labels,
        load=lambda rows, size: resized(images.rows(rows), size),
        form=form,
        class_names=names,
    )
