"""What stops a run: numbers that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from raymaml.errors import UserError

REMEDY = (
    "the last checkpoint is kept; lower inner.lr or outer.lr, or set outer.clip_norm, under another"
    " name"
)


class NotFiniteError(UserError):
    """A loss or gradient is not finite: learning cannot go on."""


def require_finite(rows: Tensor, step: int, meta_batch_size: int) -> None:
    """Check the outcomes of a meta-batch, [E, n], before the update; alike on all workers.

    Raises:
        NotFiniteError: naming the first episode whose row is not finite.
    """
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        episode = step * meta_batch_size + int((~finite).nonzero()[0, 0])
        raise NotFiniteError(
            f"outer step {step}: training episode {episode} gave a loss or gradient that is not"
            f" finite; {REMEDY}"
        )
