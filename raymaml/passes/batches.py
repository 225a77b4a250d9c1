"""Another part of the support set for each inner step."""

from __future__ import annotations

import torch
from torch import Tensor

from raymaml.common.errors import UserError
from raymaml.types import Episode, EpisodeBatch


def drawn_batches(episode: Episode | EpisodeBatch, size: int | None, count: int) -> Tensor | None:
    """Return the support rows of each inner step, ``[T, B]`` or ``[E, T, B]``; None: all in each.

    They are those that the episode brings along, or drawn from torch's random numbers: shuffled
    passes over the support set.

    Args:
        episode: one, or several.
        size: rows of each step (B); None: all.
        count: inner steps (T).

    Raises:
        UserError: the episode brings rows for fewer steps, or has fewer images than a step.
    """
    if episode.support_batches is not None:
        if episode.support_batches.shape[-2] < count:
            raise UserError(
                f"support_batches: holds {episode.support_batches.shape[-2]} inner steps, and there"
                f" are {count}"
            )
        return episode.support_batches
    if size is None:
        return None
    if isinstance(episode, EpisodeBatch):
        return torch.stack(
            [found for each in episode if (found := drawn_batches(each, size, count)) is not None]
        )
    images = len(episode.support_x)
    if size > images:
        raise UserError(
            f"inner.support_batch_size is {size}, and the support set has {images} images",
            remedy="lower it",
        )
    passes = -(-count * size // images)
    rows = torch.cat([torch.randperm(images) for _ in range(passes)] or [torch.arange(0)])
    return rows[: count * size].view(count, size).to(episode.support_x.device)


def rows_of(values: Tensor, batches: Tensor, step: int) -> Tensor:
    """Return the rows of an inner step: of ``[S, ...]`` by ``[T, B]``, or of each of E episodes."""
    if batches.dim() == 2:
        return values[batches[step]]
    return torch.stack([each[rows[step]] for each, rows in zip(values, batches, strict=True)])
