"""Pickles of images with labels: the two forms in which small benchmarks are handed round.

``data`` (uint8 [n, H, W, 3]) with ``labels``, as Gidaris and Komodakis 2018 and MetaOptNet (Lee
et al. 2019) wrote them; and ``image_data`` with ``class_dict`` (class name -> rows), as Ren et al.
2018. Keys may be bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raymaml.common.errors import UserError
from raymaml.data.importers.benchmark import LabelledFile, integers, load_rows, pixels_problem
from raymaml.data.importers.pickles import load_pickle
from raymaml.data.importers.stored import Scratch, StoredArray, open_blob

DATA_LABELS = "pickles of data and labels (Gidaris, MetaOptNet)"
CACHE = "cache pickles of image_data and class_dict (few-shot-ssl, torchmeta, learn2learn)"

_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"(lp", b"}q", b"]q")


def files_in(folder: Path) -> list[Path]:
    """Return the visible files of a folder, or, where there are none, of its folders."""
    if not folder.is_dir():
        raise UserError(f"data.source.path: {folder} is not a folder; give one that exists")
    for pattern in ("*", "*/*"):
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if visible := [path for path in files if not path.name.startswith(".")]:
            return visible
    return []


def pickles_in(folder: Path, scratch: Scratch) -> Iterator[tuple[Path, Any]]:
    """Read every pickle of a folder; text keys instead of bytes in a top-level dict.

    Raises:
        UserError: naming each file that is damaged, or asks for more than data.
    """
    problems: list[str] = []
    for path in filter(_is_pickle, files_in(folder)):
        try:
            content = load_pickle(str(path), open_blob(path), scratch)
        except UserError as error:
            problems.extend(error.problems)
            continue
        yield path, with_text_keys(content)
    if problems:
        raise UserError(*problems)


def with_text_keys(content: Any) -> Any:
    """Return a dict whose keys are text; anything else as it is."""
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


def _is_pickle(path: Path) -> bool:
    if path.suffix in {".pickle", ".pkl"}:
        return True  # or should be one: a damaged one is named
    blob = open_blob(path)
    return blob.file.read(0, min(3, blob.length)).startswith(_MAGIC)


def labelled_pickles(folder: Path, scratch: Scratch) -> list[LabelledFile]:
    """Read the pickles of images with labels in ``folder``; others are passed over.

    Raises:
        UserError: naming every file whose images or labels cannot be used.
    """
    files: list[LabelledFile] = []
    problems: list[str] = []
    for path, content in pickles_in(folder, scratch):
        try:
            keys = content.keys() if isinstance(content, dict) else set()
            if {"data", "labels"} <= keys:
                files.append(_data_and_labels(str(path), content))
            elif {"image_data", "class_dict"} <= keys:
                files.append(_image_data_and_class_dict(str(path), content))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)
    return files


def _data_and_labels(name: str, content: Mapping[str, Any]) -> LabelledFile:
    labels = integers(content["labels"])
    if labels is None:
        raise UserError(f"{name}: its labels are no whole numbers; get the file again")
    if problem := pixels_problem(name, content["data"], len(labels)):
        raise UserError(problem)
    numbers = content.get("catname2label")
    pairs = numbers.items() if isinstance(numbers, dict) else ()
    names = {n: text_of(text) for text, n in pairs if isinstance(n, int | np.integer)}
    return LabelledFile(
        name=name,
        labels=labels,
        load=partial(load_rows, content["data"]),
        form=DATA_LABELS,
        class_names={int(number): name for number, name in names.items()},
    )


def _image_data_and_class_dict(name: str, content: Mapping[str, Any]) -> LabelledFile:
    images, rows_of = content["image_data"], content["class_dict"]
    if not isinstance(rows_of, dict):
        raise UserError(f"{name}: its class_dict is a {type(rows_of).__name__}, must be a dict")
    names = sorted(map(text_of, rows_of))
    rows = {text_of(key): integers(value) for key, value in rows_of.items()}
    listed = [row for row in rows.values() if row is not None]
    count = sum(map(len, listed))
    if problem := pixels_problem(name, images, count):
        raise UserError(problem)
    labels = np.full(count, -1, dtype=np.int64)
    if not listed or any(row.min() < 0 or row.max() >= count for row in listed):
        raise UserError(f"{name}: its class_dict names rows that are not there; get it again")
    for label, text in enumerate(names):
        if (own := rows[text]) is not None:
            labels[own] = label
    if (labels < 0).any():
        raise UserError(f"{name}: its class_dict names a row twice; get the file again")
    return LabelledFile(
        name=name,
        labels=labels,
        load=partial(load_rows, images),
        form=CACHE,
        class_names=dict(enumerate(names)),
    )
