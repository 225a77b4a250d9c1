"""The result of an importer before it decodes pixels: classes, splits, sizes and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import Mistake
from raymaml.config.schema import SPLITS

PART_BYTES = 16 << 20
"""Of pixels that an import holds at a time."""


@dataclass(frozen=True, kw_only=True)
class PlannedClass:
    """A class before its images are read, which happens in parts of a bounded size."""

    name: str
    split: str
    images: Any
    """A sequence or an array [n] of whatever ``read`` takes: paths, or numbers of rows."""
    read: Callable[[Any], NDArray[np.uint8]]
    """Reads a slice of ``images``: uint8 [n, H, W, C]. Raises ``UserError`` that lists every image
    of the slice that cannot be read."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    def parts(self, image_bytes: int) -> Iterator[Any]:
        """Divide ``images`` into slices for ``read``, of ``PART_BYTES`` at most or of one image."""
        step = max(1, PART_BYTES // image_bytes)
        return (self.images[first : first + step] for first in range(0, self.count, step))

    def load(self) -> NDArray[np.uint8]:
        """Read all images."""
        return self.read(self.images)


def in_order(classes: Iterable[PlannedClass]) -> tuple[PlannedClass, ...]:
    """Sort by split (train, val, test), then name."""
    places = {str(split): place for place, split in enumerate(SPLITS)}
    return tuple(sorted(classes, key=lambda c: (places[c.split], c.name)))


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """All classes of a source in the order of the bank, and the problems found so far."""

    source: str
    licence: str
    num_channels: int
    classes: tuple[PlannedClass, ...]
    problems: tuple[str | Mistake, ...] = ()
    notes: tuple[str, ...] = ()
    """The files that the import leaves out, a line for each reason."""
    share: str = ""
    """The option that deals classes to splits, with its value; empty where the source decides."""
