"""Population-based training: who goes on from whose weights, as a function of the accuracies.

Ray Tune's ``PopulationBasedTraining`` cannot be gone on with, nor repeated: it draws donors and
perturbations from Python's global stream in the order in which results happen to come in, and
keeps what it knows in pickles of the driver and in Tune's own checkpoints. So the decision is
made here, when all trials have come to the same step, and Tune runs the trials in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymaml.config.sweep import Pbt
from raymaml.seeding import bit_stream, uniform


@dataclass(frozen=True, kw_only=True)
class Exploit:
    """A trial that goes on from the weights of another: what `lineage.json` says."""

    step: int
    """Before this outer step."""
    trial: int
    accuracy: float
    """What the trial had reached with its own weights."""
    donor: int
    donor_run: str
    """Name of the donor's run folder."""
    donor_accuracy: float
    run: str
    """Name of the run folder that the trial goes on in."""
    values: dict[str, Any]
    """The donor's values by dotted key, perturbed."""


def donors(accuracies: Mapping[int, float], pbt: Pbt, *, seed: int, step: int) -> dict[int, int]:
    """Return the donor of each trial that is replaced at ``step``.

    Args:
        accuracies: of the trials that have come to ``step``; of equal ones the trial with the
            smaller number is the better.
        pbt: the share that is replaced.
        seed: of the sweep.
        step: outer step of the comparison.
    """
    ranked = sorted(accuracies, key=lambda trial: (-accuracies[trial], trial))
    count = int(len(ranked) * pbt.quantile)
    best, worst = ranked[:count], ranked[len(ranked) - count :]
    draws = {
        trial: float(uniform(bit_stream(seed, "sweep", "donor", step, trial), 1)[0])
        for trial in worst
    }
    return {trial: best[int(draw * count)] for trial, draw in draws.items()}


def comparisons(pbt: Pbt, num_steps: int) -> Iterator[int]:
    """Yield the outer steps before which all trials are compared, and the end of the run."""
    yield from range(pbt.perturb_every, num_steps, pbt.perturb_every)
    yield num_steps
