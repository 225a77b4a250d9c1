"""How many workers train together, and when that changes: numbers alone, without Ray."""

from __future__ import annotations

from dataclasses import dataclass

from raymaml.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many workers there may be; fixed where minimum and maximum are equal."""

    minimum: int
    maximum: int
    use_gpu: bool


def elastic_crew(config: Config, use_gpu: bool) -> Crew | None:
    """Return the crew that ``cluster.min_workers`` asks for; None where it is not set.

    More workers than chunks of episodes in a meta-batch would have nothing to learn from.
    """
    cluster = config.cluster
    if cluster.min_workers is None:
        return None
    chunks = -(-config.outer.meta_batch_size // cluster.episodes_per_chunk)
    useful = max(cluster.min_workers, chunks)
    maximum = useful if cluster.num_workers == "auto" else cluster.num_workers
    return Crew(minimum=cluster.min_workers, maximum=maximum, use_gpu=use_gpu)


class Rest:
    """Tells when a number that changes has come to rest: nodes join one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: tuple[int, float] | None = None  # the number, and since when it is that

    def reached(self, number: int, now: float) -> bool:
        """Take note of the number at time ``now``; tell whether it has not changed for so long."""
        if self._last is None or self._last[0] != number:
            self._last = (number, now)
        return now - self._last[1] >= self._seconds


class Patience:
    """Bears ``max_failures`` failures in a row; a checkpoint in between starts the count anew."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._count = 0
        self._step = -1

    def ends(self, step: int) -> bool:
        """Take note of a failure; tell whether it was one too many.

        Args:
            step: of the last checkpoint.
        """
        self._count = 1 if step > self._step else self._count + 1
        self._step = step
        return self._count > self._max_failures
