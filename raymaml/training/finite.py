"""What stops a run: numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymaml.common.errors import UserError


class NotFiniteError(UserError):
    """A loss or gradient is not finite: learning cannot go on."""


def require_finite(rows: Tensor, what: str, *, step: int, kind: str, of: Sequence[int]) -> None:
    """Check the outcomes of episodes, [E, n], which all workers have alike.

    Args:
        rows: a row an episode.
        what: the numbers are, "a loss or gradient".
        step: of the outer loop.
        kind: of the episodes, "training" or "validation".
        of: indices of the episodes.

    Raises:
        NotFiniteError: naming the first episode whose row is not finite.
    """
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        raise NotFiniteError(
            f"outer step {step}: {kind} episode {of[int((~finite).nonzero()[0, 0])]} gave {what}"
            " that is not finite",
            remedy="the last checkpoint is kept; lower inner.lr or outer.lr, or set"
            " outer.clip_norm, under another name",
        )
