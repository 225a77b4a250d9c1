"""A step waits for its slowest worker: what that costs, by analysis and by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr


def expected_slowest(workers: int, episodes: int, spread: float) -> float:
    """Return the mean of the slowest worker's time, in means of one worker.

    Args:
        workers: how many have the largest share, and wait for each other.
        episodes: of each of them; their seconds are independent.
        spread: standard deviation of the logarithm of an episode's seconds, taken as lognormal.
            The sum of several is taken as a lognormal of the same mean and variance (exact for
            one).
    """
    if workers <= 1 or spread == 0:
        return 1.0
    sigma = math.sqrt(math.log1p(math.expm1(spread**2) / max(episodes, 1)))
    z = np.linspace(-12.0, 14.0, 20_001)
    density = workers * ndtr(z) ** (workers - 1) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(np.exp(sigma * z - sigma**2 / 2) * density, z))


@dataclass(frozen=True, kw_only=True)
class Hiccups:
    """Episodes that take longer than the rest: another's job, a slow disk, a hot GPU."""

    chance: float = 0.0
    """Of an episode, 0..1."""
    factor: float = 1.0
    """How many times as long it takes."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Means over the steps of a simulation."""

    step_seconds: float
    waited: float
    """Share of all workers' time that was spent waiting for others, 0..1."""


def simulate(
    *,
    shares: Sequence[int],
    episode_seconds: float,
    spread: float,
    together: float,
    checkpoint_seconds: float = 0.0,
    checkpoint_every: int = 1,
    hiccups: Hiccups | None = None,
    steps: int,
    seed: int = 0,
) -> Simulated:
    """Follow each worker's clock from step to step.

    Args:
        shares: episodes of each worker in a step.
        episode_seconds: mean, without hiccups.
        spread: as in ``expected_slowest``.
        together: seconds that all workers spend after they have met: exchange, adding, update.
        checkpoint_seconds: rank 0 writes, before it begins with its episodes...
        checkpoint_every: ...of each so-many-th step; the others wait for it when they meet.
        hiccups: of single episodes.
        steps: of the simulation.
        seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    hiccups = hiccups or Hiccups()
    workers = np.repeat(np.arange(len(shares)), shares)  # of each episode
    clocks, waited = np.zeros(len(shares)), 0.0
    for step in range(steps):
        seconds = generator.lognormal(-(spread**2) / 2, spread, len(workers)) * episode_seconds
        seconds[generator.random(len(workers)) < hiccups.chance] *= hiccups.factor
        clocks += np.bincount(workers, weights=seconds, minlength=len(shares))
        if step % checkpoint_every == 0:
            clocks[0] += checkpoint_seconds
        meeting = clocks.max()
        waited += float((meeting - clocks).sum())
        clocks[:] = meeting + together
    return Simulated(
        step_seconds=float(clocks[0]) / steps,
        waited=waited / (len(shares) * float(clocks[0])) if clocks[0] else 0.0,
    )
