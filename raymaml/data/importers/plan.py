"""What an importer finds before it decodes pixels: classes, splits, sizes and problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PlannedClass:
    """A class to be; ``load`` reads its images, uint8 [count, H, W, C].

    ``load`` raises ``UserError`` that lists every image of the class that cannot be read.
    """

    name: str
    split: str
    count: int
    load: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """All classes of a source in the order of the bank, and what is wrong with it so far."""

    source: str
    licence: str
    num_channels: int
    classes: tuple[PlannedClass, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What the import leaves out, a line each."""
    share: str = ""
    """The option that deals classes to splits, with its value; empty where the source says it."""
