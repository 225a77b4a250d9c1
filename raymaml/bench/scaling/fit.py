"""Parameters of the model from what was timed, by least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from raymaml.bench.scaling.model import Start, Storage
from raymaml.bench.scaling.network import Collective, Link, sends


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A collective that was timed."""

    collective: Collective
    workers: int
    size: int
    """Bytes that each worker hands in."""
    seconds: float


def fit_line(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Fit ``seconds = sum of coefficient * column``; no coefficient is negative.

    Errors count in relation to the seconds: they range over orders of magnitude.
    """
    weights = 1 / np.asarray(seconds)
    matrix = np.stack([np.asarray(column, dtype=float) for column in columns], axis=1)
    scale = np.abs(matrix).max(axis=0)  # messages beside bytes
    solution, _ = nnls(matrix / scale * weights[:, None], np.ones(len(weights)))
    return [float(value) for value in solution / scale]


def fit_link(timings: Sequence[Timing], cores: float) -> Link:
    """Fit latency and bandwidth; workers beyond the cores make all of them slower."""
    crowds = [max(1.0, each.workers / cores) for each in timings]
    sent = [sends(each.collective, each.workers, each.size) for each in timings]
    latency, per_byte = fit_line(
        [
            [crowd * messages for crowd, (messages, _) in zip(crowds, sent, strict=True)],
            [crowd * size for crowd, (_, size) in zip(crowds, sent, strict=True)],
        ],
        [each.seconds for each in timings],
    )
    return Link(latency=latency, bandwidth=_inverse(per_byte))


def fit_storage(sizes: Sequence[int], seconds: Sequence[float]) -> Storage:
    """Fit latency and rate to checkpoints of some bytes."""
    latency, per_byte = fit_line([[1.0] * len(sizes), sizes], seconds)
    return Storage(latency=latency, rate=_inverse(per_byte))


def fit_start(workers: Sequence[int], seconds: Sequence[float]) -> Start:
    """Fit what a run takes before and after its steps, at least a millisecond."""
    at_least = [max(1e-3, each) for each in seconds]
    fixed, per_worker = fit_line([[1.0] * len(workers), workers], at_least)
    return Start(seconds=fixed, per_worker=per_worker)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf
