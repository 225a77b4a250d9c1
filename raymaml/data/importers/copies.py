"""The copies that an import finds: named, left out or refused, by ``data.source.duplicates``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import UserError
from raymaml.config.data_sources import AnySource
from raymaml.config.schema import SPLITS, AllEpisodes
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import IMAGES_FILE, ClassImages, Duplicates, write_images
from raymaml.data.duplicates import Fingerprints, name_in, survey
from raymaml.data.importers import plan as planning
from raymaml.data.importers.plan import ImportPlan
from raymaml.data.sampling import fit_problems, fitted

REMEDY = "data.source.duplicates: drop takes them out of train and val, and keeps test whole"
AS_PUBLISHED = (
    "they stay, as published, so support and query can be one picture;"
    " data.source.duplicates: drop leaves them out"
)


def sort_out(
    bank: ImageBank,
    prints: Fingerprints,
    plan: ImportPlan,
    source: AnySource,
    episodes: AllEpisodes,
) -> tuple[dict[str, Any], list[str]]:
    """Look for copies in a bank that is being imported, and take out those that must not stay.

    Args:
        bank: in its unfinished folder; where images are taken out, its file of pixels is replaced.
        prints: of its rows.
        plan: names the images.
        source: says what happens to copies.
        episodes: the classes must still have enough images for them.

    Returns:
        The entries of the header that change, and a line for each finding.

    Raises:
        UserError: the source refuses copies, or too few images stay.
    """
    name, found, lines = partial(_name, bank, plan), survey(bank, prints), []
    is_drop, again = source.duplicates == "drop", found.repeated()
    if again.any():
        first = name(int(np.argmax(again)))
        line = f"equal to another image of their class: {again.sum():,} images, first {first}"
        is_out = is_drop or source.kind == "image-folder"
        lines.append(f"{line}; {'left out' if is_out else AS_PUBLISHED}")
        found = found.without(again) if is_out else found
    overlaps = tuple(found.overlaps(name))
    leaks = [each for each in overlaps if each.is_leak]
    if leaks and source.duplicates == "refuse":
        problems = (f"data.source.duplicates is refuse, but {each}" for each in leaks)
        raise UserError(*problems, remedy=f"remove the copies, or {REMEDY}")
    if leaks and is_drop:
        lines += [f"{each}; dropped from {each.other}" for each in leaks]
        found = found.without(found.leaking())
        overlaps = tuple(found.overlaps(name))
    lines += [f"warning: {each}; {REMEDY}" if each.is_leak else str(each) for each in overlaps]
    changes = {} if found.kept.all() else _rewrite(bank, found.kept, episodes)
    copies = Duplicates(overlaps=overlaps, in_class=int(found.repeated().sum()))
    return {**changes, "duplicates": copies.model_dump(mode="json")}, lines


def _name(bank: ImageBank, plan: ImportPlan, row: int) -> str:
    """Name an image by its file where it has one of its own."""
    class_id = int(np.searchsorted(bank.first_row, row, side="right")) - 1
    image = plan.classes[class_id].images[row - int(bank.first_row[class_id])]
    return str(image) if isinstance(image, Path) else name_in(bank, row)


def _rewrite(bank: ImageBank, kept: NDArray[np.bool_], episodes: AllEpisodes) -> dict[str, Any]:
    """Write the pixels again with the rows that are kept; return the entries of the header."""
    own = np.split(np.flatnonzero(kept), np.searchsorted(np.flatnonzero(kept), bank.first_row[1:]))
    pairs = list(zip(bank.classes, own, strict=False))
    problems = []
    for split in SPLITS:
        counts = {each.name: len(rows) for each, rows in pairs if each.split == split}
        problems += fit_problems(fitted(episodes, split, counts.values()), split, counts)
    if problems:
        raise UserError(*(f"without copies, {each}" for each in problems))
    classes: Iterator[ClassImages] = (
        (replace(entry, count=len(rows)), _parts(bank, rows)) for entry, rows in pairs
    )
    path = bank.folder / "kept.arrow"
    changes = write_images(path, classes, bank.image_shape)
    path.replace(bank.folder / IMAGES_FILE)
    return changes


def _parts(bank: ImageBank, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    step = max(1, planning.PART_BYTES // int(np.prod(bank.image_shape)))
    return (bank.images(rows[first : first + step]) for first in range(0, len(rows), step))
