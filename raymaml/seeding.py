"""Randomness as a function of names, never of history (contract 4).

A stream is named by a seed and a path (``"train", 17``). Nothing is kept between draws, so no
order of calls, no number of workers and no restart can change an episode. Only
NumPy's raw bit streams are used: they are stable across NumPy releases, its distributions are not.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def fold_in(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed from ``seed`` and a path of names."""
    # repr keeps 1 and "1" apart; the separator keeps ("a", "b") and ("ab",) apart.
    path = "\x1f".join(repr(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def bit_stream(seed: int, *names: str | int) -> np.random.Philox:
    """Return the stable stream of 64-bit words that belongs to this path."""
    return np.random.Philox(key=fold_in(seed, *names))


def draw_without_replacement(
    bits: np.random.Philox, population: int, count: int
) -> NDArray[np.int64]:
    """Draw ``count`` distinct numbers of ``range(population)``, in random order.

    Every number gets a random 64-bit key and the smallest keys win: a uniform draw up to ties of
    keys, whose probability is below ``population**2 / 2**65``. A draw of fewer is a prefix of a
    draw of more.
    """
    keys = bits.random_raw(population)
    if count < population // 4:
        smallest = np.argpartition(keys, count)[:count]
        return smallest[np.argsort(keys[smallest], kind="stable")].astype(np.int64)
    return np.argsort(keys, kind="stable")[:count].astype(np.int64)


def uniform(bits: np.random.Philox, count: int) -> NDArray[np.float64]:
    """Draw ``count`` numbers uniform in [0, 1) with 53 random bits each."""
    words: NDArray[np.uint64] = bits.random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
