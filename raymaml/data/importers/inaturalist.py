"""iNaturalist 2017 as meta-iNat (Wertheimer and Hariharan 2019): 908 and 227 classes.

``images/`` is the release of iNaturalist 2017, ``fs-splits/`` holds two CSVs without a header
whose lines are an image's path in ``images/`` and its class, a whole number. There is no val: a
share of the training classes, drawn by seed, becomes it.

The number of classes decides which CSV is train, and the name only where it is neither 908 nor 227.
Only classes are counted: numbers of images vary between the lists in circulation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import stays_inside
from raymaml.config.data_sources import INaturalist2017Source
from raymaml.data.importers.benchmark import (
    Benchmark,
    LabelledFile,
    choose,
    listed_files,
    plan_files,
)
from raymaml.data.importers.folders import by_class, read_csv
from raymaml.data.importers.images import squared
from raymaml.data.importers.plan import ImportPlan, in_order
from raymaml.seeding import bit_stream, draw_without_replacement

META_INAT = Benchmark(
    title="meta-iNat",
    licence="images of many owners, non-commercial research only (iNaturalist 2017 terms)",
    num_classes={"train": 908, "test": 227},
    label_digits=4,
)

Classes = dict[int, list[str]]
"""The images of each class, as paths below ``images/``."""


def plan_inaturalist(source: INaturalist2017Source, size: int) -> ImportPlan:
    """List the images of both CSVs by class, and take val from train.

    Raises:
        UserError: a CSV is missing or damaged, classes are missing, or an image is in both CSVs.
    """
    tables = {str(path): _read(path) for path in _tables(source.path)}
    files = [_labelled(name, classes, source.path) for name, classes in tables.items()]
    chosen = choose(files, META_INAT, source.path)
    train, test = chosen["train"].name, chosen["test"].name
    first, second = ({name for own in tables[t].values() for name in own} for t in (train, test))
    with gathered() as mistakes:
        with mistakes.kept():
            plan = plan_files(chosen, META_INAT, source, size)
        mistakes += [
            f"{train}: {name} is in {Path(test).name} too, the other split; keep it in one of them"
            for name in sorted(first & second)
        ]
    # val is a share of the training classes, at least one
    classes = [planned for planned in plan.classes if planned.split == "train"]
    count = max(1, round(source.val_fraction * len(classes)))
    bits = bit_stream(source.seed, "class-split")
    val = {classes[n].name for n in draw_without_replacement(bits, len(classes), count).tolist()}
    return replace(
        plan,
        source=f"iNaturalist 2017 (few-shot splits of {Path(train).name} and {Path(test).name}; val"
        f" is {source.val_fraction:g} of the training classes, seed {source.seed}), middle squares",
        classes=in_order(replace(c, split="val") if c.name in val else c for c in plan.classes),
    )


def _tables(folder: Path) -> list[Path]:
    for place in (folder / "fs-splits", folder):
        if tables := sorted(place.glob("*.csv")):
            return tables
    raise UserError(
        f"data.source.path: {folder} holds no fs-splits/train.csv and fs-splits/test.csv (lines"
        " path,label)",
        remedy="give the folder that holds fs-splits and images",
    )


def _read(table: Path) -> Classes:
    rows = read_csv(table, f"{table}:", "get it again")
    with gathered() as mistakes:
        return by_class(table, rows, _parse, mistakes, first_line=1)


def _parse(row: Sequence[str]) -> tuple[int, str]:
    """Return class and image of a line; raises ``ValueError`` where it is wrong."""
    if len(row) != 2 or not re.fullmatch(r" *[0-9]{1,18} *", row[1]):
        raise ValueError(f"{','.join(row)!r:.200} is not a path and a whole number; mend the line")
    if not stays_inside(row[0]):
        raise ValueError(f"{row[0]!r:.200} leaves the folder images; mend the path")
    return int(row[1]), row[0]


def _labelled(table: str, classes: Classes, folder: Path) -> LabelledFile:
    """Name the classes: in the release the images of each share a folder of its scientific name."""
    folders = {
        label: {PurePosixPath(name).parent.name for name in names}
        for label, names in classes.items()
    }
    return listed_files(
        {label: [folder / "images" / n for n in names] for label, names in classes.items()},
        squared,
        name=table,
        form="few-shot splits",
        class_names={label: own.pop() for label, own in folders.items() if len(own) == 1},
    )
