"""Images of one's own: a folder a class, or a CSV.

Three layouts: ``<split>/<class>/<image>``; ``<class>/<image>``, where whole classes are dealt to
the splits by shares and a seed (both in ``folders``); and a CSV with the header
``path,class,split`` whose paths are relative to the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from raymaml.common.errors import UserError
from raymaml.common.untrusted import stays_inside
from raymaml.config.schema import SPLITS, Split
from raymaml.config.sources import ImageFolderSource
from raymaml.data.importers.depth import bands
from raymaml.data.importers.folders import (
    Files,
    LeftOut,
    class_folders,
    inner,
    split_folders,
    split_named,
)
from raymaml.data.importers.images import decode_part, is_file, read_csv
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.seeding import bit_stream, draw_without_replacement

CSV_HEADER = ["path", "class", "split"]


def plan_image_folder(source: ImageFolderSource, image_size: int) -> ImportPlan:
    """List the classes of a folder or CSV, by split and name.

    Raises:
        UserError: the folder or the CSV cannot be read, or gives no class at all.
    """
    if not source.path.is_dir():
        raise UserError(f"data.source.path: {source.path} is not a folder; give one that exists")
    problems: list[str] = []
    left_out = LeftOut(source.path)
    dealt = False
    if source.csv is not None:
        files = _from_csv(source.csv, source.path, problems)
    else:
        root = inner(source.path, left_out)
        split = split_folders(root, problems, left_out)
        dealt = split is None
        files = _deal(class_folders(root, left_out), source) if split is None else split
    if not files and not problems:
        raise UserError(_nothing(source.path, left_out))
    most_pixels = round(source.max_megapixels * 1e6)
    square = partial(_square, mode="RGB" if source.mode == "rgb" else "L", size=image_size)
    return ImportPlan(
        source=f"image folder {source.path.name}, {source.mode}, cropped to squares",
        licence="of the images' owner",
        num_channels=3 if source.mode == "rgb" else 1,
        classes=tuple(
            PlannedClass(
                name=name,
                split=split,
                count=len(paths),
                read=partial(decode_part, paths, square, most_pixels=most_pixels),
            )
            for (split, name), paths in _in_order(files)
        ),
        problems=(*problems, *_empty_classes(files, left_out)),
        notes=left_out.notes(),
        share=f"data.source.fractions {list(source.fractions)}" if dealt else "",
    )


def _in_order(files: Files) -> list[tuple[tuple[str, str], list[Path]]]:
    """Sort by split (train, val, test), then class name; leave empty classes out."""
    full = [item for item in files.items() if item[1]]
    return sorted(full, key=lambda item: (SPLITS.index(item[0][0]), item[0][1]))


def _nothing(folder: Path, left_out: LeftOut) -> str:
    there = "; ".join(left_out.notes())
    return (
        f"data.source.path: {folder} holds no images in class folders; lay them out as"
        f" <split>/<class>/<image> or <class>/<image>{f' ({there})' if there else ''}"
    )


def _empty_classes(files: Files, left_out: LeftOut) -> list[str]:
    empty = sorted(key for key, paths in files.items() if not paths)
    there = "; ".join(left_out.notes())
    return [
        f"class {name} of split {split}: has no images that Pillow reads; add some or remove its"
        f" folder{f' ({there})' if there else ''}"
        for split, name in empty
    ]


def _deal(classes: dict[str, list[Path]], source: ImageFolderSource) -> Files:
    """Deal whole classes to the splits: shares of a seeded order, rounded to whole classes."""
    names = list(classes)
    order = draw_without_replacement(bit_stream(source.seed, "class-split"), len(names), len(names))
    train, val, test = source.fractions
    bounds = np.rint(np.cumsum([train, val]) / (train + val + test) * len(names))
    split_of = np.searchsorted(bounds, np.arange(len(names)), side="right")
    return {
        (SPLITS[split], names[number]): classes[names[number]]
        for split, number in zip(split_of.tolist(), order.tolist(), strict=True)
    }


def _from_csv(table: Path, folder: Path, problems: list[str]) -> Files:
    rows = read_csv(table, f"data.source.csv: {table}", "give a CSV")
    if not rows or [cell.strip().lower() for cell in rows[0]] != CSV_HEADER:
        found = ",".join(rows[0]) if rows else "nothing"
        raise UserError(f"{table}:1: the header is {found}; it must be {','.join(CSV_HEADER)}")
    files: Files = {}
    seen: set[Path] = set()
    for line, row in enumerate(rows[1:], 2):
        try:
            if row:
                path, name, split = _row(row, folder)
                if path in seen:
                    raise ValueError(f"{row[0]} is listed twice; an image may be in one class only")
                seen.add(path)
                files.setdefault((split, name), []).append(path)
        except ValueError as error:
            problems.append(f"{table}:{line}: {error}")
    return files


def _row(row: Sequence[str], folder: Path) -> tuple[Path, str, Split]:
    """Return path, class and split of a row.

    Raises:
        ValueError: one of them is wrong, or missing.
    """
    if len(row) != len(CSV_HEADER) or not all(row):
        raise ValueError(
            f"{','.join(row)!r:.200} does not give path, class and split; write all three"
        )
    if (split := split_named(row[2])) is None:
        raise ValueError(f"split is {row[2]!r:.200}; it must be one of {', '.join(SPLITS)}")
    return _path(row[0], folder), row[1], split


def _path(name: str, folder: Path) -> Path:
    """Return the file that a path of the CSV names; backslashes separate folders as slashes do.

    Raises:
        ValueError: it is outside of ``folder``, or there is none.
    """
    inside = name.replace("\\", "/")
    if PureWindowsPath(name).drive or inside.startswith(("/", "~/")):
        raise ValueError(f"{name!r:.200} is not relative; write the path as it is below {folder}")
    if not stays_inside(inside):
        raise ValueError(f"{name!r:.200} leaves the folder of the images; mend the path")
    path = folder / inside
    if not is_file(path):
        raise ValueError(f"{path!s:.300} does not exist; mend the path")
    return path


def _square(image: Image.Image, mode: str, size: int) -> NDArray[np.uint8]:
    """Turn upright, scale the shorter side to ``size`` with Lanczos' filter, crop the middle."""
    ImageOps.exif_transpose(image, in_place=True)
    if "A" in image.getbands() or "transparency" in image.info:
        image = _on_white(image, mode)
    elif image.mode != mode:
        image = image.convert(mode)
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """Lay a transparent image on white: what is under transparency is arbitrary."""
    flat = Image.new(mode, image.size)
    for box in bands(image.size):
        overlay = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        white.alpha_composite(overlay)
        flat.paste(white.convert(mode), box)
    return flat
