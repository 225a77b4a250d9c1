"""Contact sheets: a bank or an episode at a glance, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raymaml.config.schema import SPLITS
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows, by_label
from raymaml.seeding import bit_stream, draw_without_replacement

_CELL = 56  # pixels that small images are enlarged to, at most
_LABEL, _GAP, _HEADER = 230, 3, 20  # pixels
_INK, _PAPER = (30, 30, 30), (250, 250, 250)


Row = tuple[str, NDArray[np.uint8]]
"""A label and images [n, H, W, C]."""


def bank_sheet(
    bank: ImageBank,
    path: Path,
    *,
    classes_per_split: int = 8,
    images_per_class: int = 12,
    seed: int = 0,
) -> None:
    """Draw the first images of a seeded choice of classes of each split into ``path``."""
    rows = []
    for split in SPLITS:
        ids = bank.class_ids(split)
        bits = bit_stream(seed, "contact-sheet", split)
        chosen = draw_without_replacement(bits, len(ids), min(classes_per_split, len(ids)))
        for class_id in ids[chosen].tolist():
            images = bank.class_images(class_id)[:images_per_class]
            rows.append((f"{split}  {bank.classes[class_id].name}", images))
    _draw(path, rows, {0: f"{bank.num_images} images of {len(bank.classes)} classes"})


def episode_sheet(bank: ImageBank, rows: EpisodeRows, path: Path) -> None:
    """Draw an episode into ``path``: a row a class, its support images, then its query images."""
    ways = len(rows.classes)
    support = by_label(rows.support, rows.support_labels, ways)  # [N, K]
    query = by_label(rows.query, rows.query_labels, ways)
    labelled = [
        (
            f"{way}  {bank.classes[class_id].name}",
            bank.images(np.concatenate([support[way], query[way]])),
        )
        for way, class_id in enumerate(rows.classes.tolist())
    ]
    _draw(path, labelled, {0: "support", support.shape[1]: "query"})


def _draw(path: Path, rows: Sequence[Row], headings: dict[int, str]) -> None:
    """Draw rows of images; each of ``headings`` opens a block at its column."""
    height, width = rows[0][1].shape[1:3]
    zoom = max(1, _CELL // max(height, width))
    step_x, step_y = width * zoom + _GAP, height * zoom + _GAP
    blocks = sorted(headings)
    columns = max(len(images) for _, images in rows)
    # a block begins a little to the right of the last one's end
    lefts = [
        _LABEL + column * step_x + 4 * _GAP * sum(column >= block for block in blocks)
        for column in range(columns + 1)
    ]
    sheet = Image.new("RGB", (lefts[-1] + _GAP, _HEADER + len(rows) * step_y + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column in blocks:
        draw.text((lefts[column], _HEADER // 2), headings[column], _INK, font, anchor="lm")
    for number, (name, images) in enumerate(rows):
        top = _HEADER + number * step_y
        middle = top + height * zoom // 2
        # plain ASCII is the one set that the font surely has
        label = name.encode("ascii", "backslashreplace").decode()
        while font.getlength(label) > _LABEL - 4 * _GAP:
            label = label.removesuffix("...")[:-1] + "..."
        draw.text((2 * _GAP, middle), label, _INK, font, anchor="lm")
        for left, image in zip(lefts, images, strict=False):
            pixels = image if image.shape[-1] == 3 else image[..., 0]
            larger = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
            sheet.paste(Image.fromarray(larger), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
