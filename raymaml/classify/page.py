"""The page of a prediction: support images by class, then the pictures, unsure ones first."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from raymaml.reports.document import rendered

MOST_SHOWN = 1000
"""Pictures on a page: the least sure; and as many errors."""
_THUMBNAIL = 160
_SMALL = 64
"""Pixels of a side up to which a picture keeps each pixel."""
Pixels = NDArray[np.uint8]


class Shown(NamedTuple):
    """A picture that is predicted, by its row of the output."""

    probability: float
    number: int
    path: str
    predicted: str
    other: str
    other_probability: float


@dataclass(kw_only=True)
class Tally:
    """What is kept of the rows while they are written: counts, errors, and the least sure."""

    classes: Sequence[str]
    most_shown: int = 0
    num_rows: int = 0
    num_errors: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[Shown] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        """Count the next rows."""
        names = table["predicted"].to_pylist()
        paths, errors = table["path"].to_pylist(), table["error"].to_pylist()
        broken = [pair for pair in zip(paths, errors, strict=True) if pair[1] is not None]
        self.counts.update(name for name in names if name is not None)
        self.num_errors += len(broken)
        if self.most_shown:
            self.errors = (self.errors + broken)[: self.most_shown]
            self.shown = nsmallest(self.most_shown, [*self.shown, *self._rows(table)])
        self.num_rows += table.num_rows

    def _rows(self, table: pa.Table) -> list[Shown]:
        chances = np.stack([table[f"p_{name}"].to_numpy() for name in self.classes], axis=1)
        first, second = np.argsort(-chances, axis=1, kind="stable")[:, :2].T
        return [
            Shown(
                probability=float(chances[row, first[row]]),
                number=self.num_rows + row,
                path=path,
                predicted=self.classes[first[row]],
                other=self.classes[second[row]],
                other_probability=float(chances[row, second[row]]),
            )
            for row, path in enumerate(table["path"].to_pylist())
            if not np.isnan(chances[row, 0])
        ]


def page(
    tally: Tally,
    lines: Sequence[str],
    support: Mapping[str, Sequence[tuple[str, Pixels]]],
    pixels: Callable[[int], Pixels],
) -> str:
    """Return the page as HTML, which needs no other file.

    Args:
        tally: of all rows.
        lines: to stand at the top.
        support: class name -> path and pixels [H, W, C] of its images.
        pixels: reads a picture by the number of its row.
    """
    predicted: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(tally.counts)}
    for each in sorted(tally.shown):
        figure = _figure(each.path, pixels(each.number))
        predicted[each.predicted].append({**each._asdict(), **figure})
    hidden = sum(tally.counts.values()) - len(tally.shown)
    more = [f"The {len(tally.shown):,} least sure pictures are shown."] if hidden else []
    return rendered(
        "raymaml.classify",
        "page.html.jinja",
        title="Predictions",
        lines=[*lines, *more],
        support={
            name: [_figure(path, image) for path, image in images]
            for name, images in support.items()
        },
        predicted={name: pictures for name, pictures in predicted.items() if pictures},
        counts=tally.counts,
        errors=tally.errors,
    )


def _figure(path: str, image: Pixels) -> dict[str, str]:
    """Return name, path and a thumbnail as a data URI."""
    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if max(picture.size) <= _SMALL else "jpeg"  # which would smudge small ones
    out = BytesIO()
    picture.save(out, kind, quality=90)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    name = path.rstrip("/").rpartition("/")[2]
    return {"path": path, "name": name, "kind": kind, "data": f"data:image/{kind};base64,{data}"}
