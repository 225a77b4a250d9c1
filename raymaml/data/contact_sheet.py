"""Contact sheets: a bank or an episode at a glance, as a PNG that a phone can show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raymaml.config.schema import SPLITS
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows
from raymaml.seeding import bit_stream, draw_without_replacement

WIDTH, TEXT = 720, 26
"""Pixels of a sheet, and of its letters: on a screen of 360 pixels they are 12 pixels high."""
_CELL, _LARGEST = 84, 168  # pixels that small images are enlarged to, and large ones reduced to
_GAP, _FRAME, _LINE = 12, 4, 40  # pixels
_INK, _PAPER, _WRONG = (30, 30, 30), (250, 250, 250), (207, 34, 46)


Frame = tuple[tuple[int, int, int], str]
"""Colour of a frame, and the text on it."""
Row = tuple[str, NDArray[np.uint8], Sequence[Frame | None]]
"""A label, images [n, H, W, C], and the frame of each image that has one."""


def bank_sheet(
    bank: ImageBank,
    path: Path,
    *,
    classes_per_split: int = 8,
    images_per_class: int = 12,
    seed: int = 0,
) -> None:
    """Draw the first images of a seeded choice of classes of each split into ``path``."""
    rows: list[Row] = []
    for split in SPLITS:
        ids = bank.class_ids(split)
        bits = bit_stream(seed, "contact-sheet", split)
        chosen = draw_without_replacement(bits, len(ids), min(classes_per_split, len(ids)))
        for class_id in ids[chosen].tolist():
            images = bank.class_images(class_id)[:images_per_class]
            rows.append((f"{split}  {bank.classes[class_id].name}", images, [None] * len(images)))
    _draw(path, [f"{bank.num_images} images of {len(bank.classes)} classes"], rows)


def episode_sheet(
    bank: ImageBank,
    rows: EpisodeRows,
    path: Path,
    predictions: NDArray[np.int64] | None = None,
) -> None:
    """Draw an episode into ``path``: of each class its support images, then its query images.

    Args:
        bank: holds the images.
        rows: the episode.
        path: of the PNG.
        predictions: the label of each query [N*Q] that a model gave, -1 for none; the wrong ones
            are marked. None marks none.
    """
    legend = ["dark frame: support image"]
    taken = rows.query_labels
    if predictions is not None:
        taken = predictions
        legend.append("red frame: wrong, taken for the class of that number")
    found: list[Row] = []
    for way, class_id in enumerate(rows.classes.tolist()):
        support, query = (labels == way for labels in (rows.support_labels, rows.query_labels))
        images = bank.images(np.concatenate([rows.support[support], rows.query[query]]))
        frames: list[Frame | None] = [(_INK, "")] * int(support.sum())
        for label in taken[query].tolist():
            frames.append(None if label == way else (_WRONG, str(label) if label >= 0 else "?"))
        found.append((f"{way}  {bank.classes[class_id].name}", images, frames))
    _draw(path, legend, found)


def _draw(path: Path, headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Draw lines of text, then each row: its label, and below it its images in lines."""
    side = _tile(rows[0][1][0]).size
    columns = max(1, (WIDTH - _GAP) // (side[0] + _GAP))
    height = (
        _GAP
        + _LINE * len(headings)
        + sum(_LINE + -(-len(images) // columns) * (side[1] + _GAP) + _GAP for _, images, _ in rows)
    )
    sheet = Image.new("RGB", (WIDTH, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    top = _GAP
    for text in headings:
        draw.text((_GAP, top + _LINE // 2), text, _INK, font, anchor="lm")
        top += _LINE
    for name, images, frames in rows:
        draw.text((_GAP, top + _LINE // 2), _label(name, font), _INK, font, anchor="lm")
        top += _LINE
        for at, (image, frame) in enumerate(zip(images, frames, strict=True)):
            line, column = divmod(at, columns)
            left, upper = _GAP + column * (side[0] + _GAP), top + line * (side[1] + _GAP)
            sheet.paste(_tile(image), (left, upper))
            if frame is not None:
                _frame(draw, font, (left, upper, left + side[0] - 1, upper + side[1] - 1), frame)
        top += -(-len(images) // columns) * (side[1] + _GAP) + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _tile(image: NDArray[np.uint8]) -> Image.Image:
    """Return an image [H, W, C] enlarged by a whole number, or made smaller."""
    zoom = max(1, _CELL // max(image.shape[:2]))
    pixels = image if image.shape[-1] == 3 else image[..., 0]
    tile = Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))
    tile.thumbnail((_LARGEST, _LARGEST))
    return tile


def _frame(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: tuple[int, int, int, int],
    frame: Frame,
) -> None:
    """Draw a frame around the pixels of ``box``, and its text in the lower right corner."""
    color, text = frame
    left, top, right, bottom = box
    outer = (left - _FRAME, top - _FRAME, right + _FRAME, bottom + _FRAME)
    draw.rectangle(outer, outline=color, width=_FRAME)
    if text:
        corner = (right - font.getlength(text) - _FRAME, bottom - TEXT, right, bottom)
        draw.rectangle(corner, fill=color)
        draw.text((right, bottom), text, _PAPER, font, anchor="rb")


def _label(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a name, cut to the width of the sheet."""
    # plain ASCII is the one set that the font surely has
    label = name.encode("ascii", "backslashreplace").decode()
    while font.getlength(label) > WIDTH - 2 * _GAP:
        label = label.removesuffix("...")[:-1] + "..."
    return label
