"""Images of one's own: a folder a class, or a CSV.

Three layouts: ``<split>/<class>/<image>`` with the splits train, val and test;
``<class>/<image>``, where whole classes are dealt to the splits by shares and a seed; and a CSV
with the header ``path,class,split`` whose paths are relative to the folder. Hidden files are
ignored, as are files that are not images by their suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from raymaml.config.schema import SPLITS
from raymaml.config.sources import ImageFolderSource
from raymaml.data.importers.images import decode_files, is_file, read_csv
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.errors import UserError
from raymaml.outside import stays_inside
from raymaml.seeding import bit_stream, draw_without_replacement

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
CSV_HEADER = ["path", "class", "split"]

Files = dict[tuple[str, str], list[Path]]
"""(split, class name) -> its images."""


def plan_image_folder(source: ImageFolderSource, image_size: int) -> ImportPlan:
    """List the classes of a folder or CSV, by split and name.

    Raises:
        UserError: the folder or the CSV cannot be read, or gives no class at all.
    """
    if not source.path.is_dir():
        raise UserError(f"data.source.path: {source.path} is not a folder; give one that exists")
    problems: list[str] = []
    if source.csv is not None:
        files = _from_csv(source.csv, source.path, problems)
    elif any((source.path / split).is_dir() for split in SPLITS):
        files = _from_split_folders(source.path, problems)
    else:
        files = _from_class_folders(source)
    if not files and not problems:
        raise UserError(
            f"data.source.path: {source.path} holds no images; lay them out as"
            " <split>/<class>/<image> or <class>/<image>"
        )
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
                load=partial(decode_files, paths, square),
            )
            for (split, name), paths in _in_order(files)
        ),
        problems=(*problems, *_empty_classes(files)),
    )


def _in_order(files: Files) -> list[tuple[tuple[str, str], list[Path]]]:
    """Sort by split (train, val, test), then class name; leave empty classes out."""
    full = [item for item in files.items() if item[1]]
    return sorted(full, key=lambda item: (SPLITS.index(item[0][0]), item[0][1]))


def _empty_classes(files: Files) -> list[str]:
    return [
        f"class {name} of split {split}: has no images ({', '.join(SUFFIXES)}); add some or"
        " remove its folder"
        for (split, name), paths in sorted(files.items())
        if not paths
    ]


def _from_split_folders(folder: Path, problems: list[str]) -> Files:
    files: Files = {}
    for split_folder in _visible(folder):
        if split_folder.is_dir() and split_folder.name not in SPLITS:
            problems.append(
                f"{split_folder}: is not a split; beside {', '.join(SPLITS)} no other folder"
                " may stand"
            )
    for split in SPLITS:
        for class_folder in _class_folders(folder / split):
            files[split, class_folder.name] = _images_in(class_folder)
    return files


def _from_class_folders(source: ImageFolderSource) -> Files:
    """Deal whole classes to the splits: shares of a seeded order, rounded to whole classes."""
    folders = _class_folders(source.path)
    order = draw_without_replacement(
        bit_stream(source.seed, "class-split"), len(folders), len(folders)
    )
    train, val, test = source.fractions
    bounds = np.rint(np.cumsum([train, val]) / (train + val + test) * len(folders))
    split_of = np.searchsorted(bounds, np.arange(len(folders)), side="right")
    return {
        (SPLITS[split], folders[number].name): _images_in(folders[number])
        for split, number in zip(split_of.tolist(), order.tolist(), strict=True)
    }


def _from_csv(table: Path, folder: Path, problems: list[str]) -> Files:
    rows = read_csv(table, f"data.source.csv: {table}", "give a CSV")
    if not rows or rows[0] != CSV_HEADER:
        found = ",".join(rows[0]) if rows else "nothing"
        raise UserError(f"{table}:1: the header is {found}; it must be {','.join(CSV_HEADER)}")
    files: Files = {}
    seen: set[Path] = set()
    for line, row in enumerate(rows[1:], 2):
        if problem := _row_problem(row, folder, seen):
            problems.append(f"{table}:{line}: {problem}")
        elif row:
            files.setdefault((row[2], row[1]), []).append(folder / row[0])
    return files


def _row_problem(row: Sequence[str], folder: Path, seen: set[Path]) -> str | None:
    """Say what is wrong with a row of the CSV; an empty line is fine."""
    if not row:
        return None
    if len(row) != len(CSV_HEADER) or not all(row):
        return f"{','.join(row)!r:.200} does not give path, class and split; write all three"
    if row[2] not in SPLITS:
        return f"split is {row[2]!r:.200}; it must be one of {', '.join(SPLITS)}"
    return _path_problem(row[0], folder, seen)


def _path_problem(name: str, folder: Path, seen: set[Path]) -> str | None:
    """Say what is wrong with a path of the CSV; note one that is right."""
    if not stays_inside(name):
        return f"{name!r:.200} leaves the folder of the images; mend the path"
    path = folder / name
    if not is_file(path):
        return f"{path!s:.300} does not exist; mend the path"
    if path in seen:
        return f"{name} is listed twice; an image may be in one class only"
    seen.add(path)
    return None


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _images_in(folder: Path) -> list[Path]:
    named = (path for path in _visible(folder) if path.suffix.lower() in SUFFIXES)
    return [path for path in named if path.is_file()]


def _square(image: Image.Image, mode: str, size: int) -> NDArray[np.uint8]:
    """Turn upright, scale the shorter side to ``size`` with Lanczos' filter, crop the middle."""
    upright = ImageOps.exif_transpose(image)
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = _on_white(upright)
    fitted = ImageOps.fit(upright.convert(mode), (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _on_white(image: Image.Image) -> Image.Image:
    """Lay a transparent image on white: what is under transparency is arbitrary."""
    overlay = image.convert("RGBA")
    background = Image.new("RGBA", overlay.size, "white")
    return Image.alpha_composite(background, overlay)
