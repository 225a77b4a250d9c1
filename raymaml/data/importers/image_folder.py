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
from PIL import Image, ImageOps

from raymaml.common.errors import Mistakes, UserError
from raymaml.common.untrusted import stays_inside
from raymaml.config.data_sources import ImageFolderSource
from raymaml.config.schema import SPLITS
from raymaml.data.importers.folders import (
    Files,
    LeftOut,
    by_class,
    find_classes,
    notes_of,
    read_csv,
    split_named,
)
from raymaml.data.importers.images import Images, decode_files, is_file, upright
from raymaml.data.importers.plan import ImportPlan, PlannedClass, in_order
from raymaml.seeding import bit_stream, draw_without_replacement

CSV_HEADER = ["path", "class", "split"]


def plan_image_folder(source: ImageFolderSource, image_size: int) -> ImportPlan:
    """List the classes of a folder or CSV, by split and name.

    Raises:
        UserError: the folder or the CSV cannot be read, or gives no class at all.
    """
    mistakes = Mistakes()
    left_out = LeftOut(list)
    share = ""
    if source.csv is not None:
        files = _from_csv(source.csv, source.path, mistakes)
    else:
        files = find_classes(source.path, mistakes, left_out)
        if not all(split for split, _ in files):
            files = _deal(files, source)
            share = f"data.source.fractions {list(source.fractions)}"
    notes = notes_of(left_out, source.path)
    there = f" ({'; '.join(notes)})" if notes else ""
    if not files and not mistakes:
        raise UserError(
            f"data.source.path: {source.path} holds no images in class folders",
            remedy=f"lay them out as <split>/<class>/<image> or <class>/<image>{there}",
        )
    mistakes += [
        f"class {name} of split {split}: has no images that Pillow reads; add some or remove its"
        f" folder{there}"
        for (split, name), paths in sorted(files.items())
        if not paths
    ]
    square = partial(_square, mode="RGB" if source.mode == "rgb" else "L", size=image_size)
    most_pixels = round(source.max_megapixels * 1e6)
    return ImportPlan(
        source=f"image folder {source.path.name}, {source.mode}, cropped to squares",
        licence="of the images' owner",
        num_channels=3 if source.mode == "rgb" else 1,
        classes=in_order(
            PlannedClass(
                name=name,
                split=split,
                images=own,
                read=partial(decode_files, transform=square, most_pixels=most_pixels),
            )
            for (split, name), own in files.items()
            if own
        ),
        problems=tuple(mistakes),
        notes=notes,
        share=share,
    )


def _deal(files: Files, source: ImageFolderSource) -> Files:
    """Deal whole classes to the splits: shares of a seeded order, rounded to whole classes."""
    classes = [(name, images) for (_, name), images in files.items()]
    order = draw_without_replacement(
        bit_stream(source.seed, "class-split"), len(classes), len(classes)
    )
    train, val, test = source.fractions
    bounds = np.rint(np.cumsum([train, val]) / (train + val + test) * len(classes))
    splits = np.searchsorted(bounds, np.arange(len(classes)), side="right")
    return {
        (SPLITS[split], classes[number][0]): classes[number][1]
        for split, number in zip(splits.tolist(), order.tolist(), strict=True)
    }


def _from_csv(table: Path, folder: Path, mistakes: Mistakes) -> Files:
    header, *rows = read_csv(table, f"data.source.csv: {table}", "give a CSV") or [["nothing"]]
    if [cell.strip().lower() for cell in header] != CSV_HEADER:
        problem = f"{table}:1: the header is {','.join(header)}"
        raise UserError(problem, remedy=f"it must be {','.join(CSV_HEADER)}")
    return by_class(table, rows, partial(_parse, folder), mistakes)


def _parse(folder: Path, row: Sequence[str]) -> tuple[tuple[str, str], Path]:
    """Return split, class and path of a row; raises ``ValueError`` where it is wrong."""
    if len(row) != len(CSV_HEADER) or not all(row):
        raise ValueError(
            f"{','.join(row)!r:.200} does not give path, class and split; write all three"
        )
    if (split := split_named(row[2])) is None:
        raise ValueError(f"split is {row[2]!r:.200}; it must be one of {', '.join(SPLITS)}")
    name = row[0]
    inside = name.replace("\\", "/")  # of lists that were made on Windows
    if PureWindowsPath(name).drive or inside.startswith(("/", "~/")):
        raise ValueError(f"{name!r:.200} is not relative; write the path as it is below {folder}")
    if not stays_inside(inside):
        raise ValueError(f"{name!r:.200} leaves the folder of the images; mend the path")
    path = folder / inside
    if not is_file(path):
        raise ValueError(f"{path!s:.300} does not exist; mend the path")
    return (split, row[1]), path


def _square(image: Image.Image, mode: str, size: int) -> Images:
    """Turn upright, scale the shorter side to ``size`` with Lanczos' filter, crop the middle."""
    fitted = ImageOps.fit(upright(image, mode), (size, size), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(fitted))
