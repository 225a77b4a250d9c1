"""iNaturalist 2017 as meta-iNat (Wertheimer and Hariharan 2019): 908 and 227 classes.

``images/`` is the release of iNaturalist 2017, ``fs-splits/`` holds two CSVs without a header
whose lines are an image's path in ``images/`` and its class, a whole number. There is no val: a
share of the training classes, drawn by seed, becomes it.

The number of classes decides which CSV is train, and the name only where it is neither 908 nor 227.
Only classes are counted: numbers of images vary between the lists in circulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import stays_inside
from raymaml.config.schema import Split
from raymaml.config.sources import INaturalist2017Source
from raymaml.data.importers.benchmark import KEEP_ANYWAY
from raymaml.data.importers.images import decode_files, squared
from raymaml.data.importers.lists import by_class, read_csv
from raymaml.data.importers.plan import ImportPlan, PlannedClass, in_order
from raymaml.seeding import bit_stream, draw_without_replacement

NUM_CLASSES: dict[Split, int] = {"train": 908, "test": 227}
LICENCE = "images of many owners, non-commercial research only (iNaturalist 2017 terms)"

Classes = dict[int, list[str]]
"""The images of each class, as paths below ``images/``."""


def plan_inaturalist(source: INaturalist2017Source, size: int) -> ImportPlan:
    """List the images of both CSVs by class, and take val from train.

    Raises:
        UserError: a CSV is missing or damaged, or classes are missing.
    """
    tables = {path: _read(path) for path in _tables(source.path)}
    chosen = _choose(tables, source.path)
    _verify(chosen, tables, source.verify_counts)
    val = _drawn(tables[chosen["train"]], source)
    classes = []
    for split, table in chosen.items():
        for label, names in tables[table].items():
            paths = [source.path / "images" / name for name in names]
            # in the release the images of a class share a folder of its scientific name
            folders = {PurePosixPath(name).parent.name for name in names}
            common = folders.pop() if len(folders) == 1 else ""
            classes.append(
                PlannedClass(
                    name=f"{split}-{label:04d} {common}".rstrip(),
                    split="val" if split == "train" and label in val else split,
                    count=len(paths),
                    read=partial(decode_files, paths, squared(size)),
                )
            )
    return ImportPlan(
        source=f"iNaturalist 2017 (few-shot splits of {chosen['train'].name} and"
        f" {chosen['test'].name}; val is {source.val_fraction:g} of the training classes, seed"
        f" {source.seed}), middle squares",
        licence=LICENCE,
        num_channels=3,
        classes=in_order(classes),
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


def _choose(tables: Mapping[Path, Classes], folder: Path) -> dict[Split, Path]:
    chosen: dict[Split, Path] = {}
    for split, count in NUM_CLASSES.items():
        sized = [table for table, classes in tables.items() if len(classes) == count]
        named = [table for table in tables if split in table.stem.lower()]
        for candidates in (sized, named):
            if split not in chosen and len(candidates) == 1:
                chosen[split] = candidates[0]
    if len(set(chosen.values())) < len(NUM_CLASSES):
        there = ", ".join(f"{table.name} ({len(c)} classes)" for table, c in tables.items())
        raise UserError(
            f"data.source.path: {folder} does not hold one CSV of train (908 classes) and one of"
            f" test (227 classes), but {there}",
            remedy="call them train.csv and test.csv",
        )
    return chosen


def _verify(
    chosen: Mapping[Split, Path], tables: Mapping[Path, Classes], verify_counts: bool
) -> None:
    """Check the numbers of classes, if asked to, and that no image is of both splits."""
    first, second = ({name for own in tables[t].values() for name in own} for t in chosen.values())
    one, other = chosen.values()
    with gathered() as mistakes:
        mistakes += [
            f"{table}: split {split} has {len(tables[table])} classes, meta-iNat has"
            f" {NUM_CLASSES[split]}; {KEEP_ANYWAY}"
            for split, table in chosen.items()
            if verify_counts and len(tables[table]) != NUM_CLASSES[split]
        ]
        mistakes += [
            f"{one}: {name} is in {other.name} too, the other split; keep it in one of them"
            for name in sorted(first & second)
        ]


def _drawn(classes: Classes, source: INaturalist2017Source) -> set[int]:
    """Draw the training classes that become val: a share of them, at least one."""
    labels = sorted(classes)
    count = max(1, round(source.val_fraction * len(labels)))
    bits = bit_stream(source.seed, "class-split")
    return {labels[place] for place in draw_without_replacement(bits, len(labels), count).tolist()}
