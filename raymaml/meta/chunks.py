"""Several episodes at once: each tensor of one has a leading axis E."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from raymaml.meta.gradients import EpisodeGradient
from raymaml.types import Params


def repeated(values: Params, count: int) -> Params:
    """Copy each tensor ``count`` times along a leading axis E."""
    return {name: value.repeat(count, *([1] * value.dim())) for name, value in values.items()}


def apart(chunk: EpisodeGradient, labels: Tensor) -> list[EpisodeGradient]:
    """Take the outcome of a chunk to pieces.

    Args:
        chunk: each tensor with a leading axis E; its loss is the sum.
        labels: ``[E, N*Q]``, by which each episode has its own loss.
    """
    return [
        EpisodeGradient(
            loss=F.cross_entropy(chunk.logits[number], labels[number]),
            logits=chunk.logits[number],
            grads={name: value[number] for name, value in chunk.grads.items()},
            buffers={name: value[number] for name, value in chunk.buffers.items()},
        )
        for number in range(len(labels))
    ]
