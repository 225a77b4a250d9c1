"""The exact reduction: results do not depend on how episodes were shared out (contract 2).

A sum of floats depends on its order. So gradients are kept per episode, gathered from all workers
in episode order, and added one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymaml.types import Params


def share(count: int, rank: int, world_size: int, chunk: int = 1) -> range:
    """Return this worker's contiguous share of ``range(count)``; the first ones get the excess.

    Shares are of whole chunks of consecutive episodes, of which the last may be smaller: what is
    computed together does not depend on the number of workers.
    """
    quotient, excess = divmod(-(-count // chunk), world_size)
    start = rank * quotient + min(rank, excess)
    stop = start + quotient + (rank < excess)
    return range(min(start * chunk, count), min(stop * chunk, count))


def share_sizes(count: int, world_size: int, chunk: int = 1) -> list[int]:
    """Return the length of every worker's share."""
    return [len(share(count, rank, world_size, chunk)) for rank in range(world_size)]


def flatten(grads: Params) -> Tensor:
    """Concatenate all entries, in the order of the dictionary: ``[P]``."""
    return torch.cat([grad.reshape(-1) for grad in grads.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Cut ``[..., P]`` into pieces of the shapes of ``like``: ``[..., *shape]``."""
    pieces = vector.split([value.numel() for value in like.values()], dim=-1)
    return {
        name: piece.reshape((*vector.shape[:-1], *value.shape))
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def mean_in_order(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Average ``[E, ...]`` over E by adding row after row, whatever the number of threads."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / len(rows)


def read(numbers: Params) -> dict[str, float]:
    """Return numbers, [] each, from their device, for which it is waited once."""
    return dict(
        zip(numbers, torch.stack([n.double() for n in numbers.values()]).tolist(), strict=True)
    )
