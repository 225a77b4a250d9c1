"""What a measurement says, and how much results may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymaml.bench.cases import Phase

TOLERANCE = 1e-6
"""Of results in float64, relative to the largest entry. Rounding gives 1e-14. It is not judged in
float32, where a rectifier or a maximum that rounding tips over may move a gradient by 1e-3."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one configuration: a line of the table, an object of the JSON file."""

    config: str
    """Name of the configuration."""
    phase: Phase
    """training: a meta-gradient an episode; evaluation: adaptation without a graph, and queries."""
    library: str
    """raymaml; plain (PyTorch alone); higher; torchopt."""
    method: str
    """How the meta-gradient is computed; ``adapt`` in evaluation."""
    processes: int
    """That computed at the same time, an episode each."""
    threads: int
    """Of each process."""
    inner_steps: int
    episodes_per_second: float
    """Of all processes together; the median over the rounds."""
    peak_mib: float | None
    """Highest memory in one episode above that before it, MiB, times ``processes``; None where the
    system does not say."""
    aten_calls: int | None = None
    """Operators called for one episode; None where it was not counted."""
    difference: float | None = None
    """Of its gradient, or logits, from the first contender's, in float32: the largest entry of the
    difference by the largest of the result. None where it was not compared."""
    difference_float64: float | None = None
    """The same in float64."""

    @property
    def contender(self) -> str:
        """Library and method."""
        return label(self.library, self.method)

    @property
    def option(self) -> str:
        """What ``--methods`` calls it."""
        return self.method if self.library == "raymaml" else self.library


def label(library: str, method: str) -> str:
    """Name a contender; others than raymaml have one method only."""
    return f"{library} {method}" if library == "raymaml" else library


def relative_difference(value: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Return the largest entry of the difference by the largest of ``reference``."""
    if value.shape != reference.shape:
        return float("inf")
    scale = float(np.abs(reference).max())
    difference = float(np.abs(value - reference).max())
    return difference / scale if scale else difference


def disagreements(what: str, results: Mapping[str, NDArray[np.floating]]) -> list[str]:
    """Name every contender whose result, in float64, is not that of the first one."""
    (first, reference), *others = results.items()
    problems = []
    for name, value in others:
        difference = relative_difference(value, reference)
        if not difference <= TOLERANCE:  # nor NaN
            problems.append(
                f"{what}: {name} and {first} disagree: the relative difference is"
                f" {difference:.1e}, at most {TOLERANCE:.0e} is rounding; nothing was timed"
            )
    return problems
