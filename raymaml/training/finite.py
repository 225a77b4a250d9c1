"""What stops a run: numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raymaml.common.errors import UserError
from raymaml.types import Params


class NotFiniteError(UserError):
    """A loss or gradient is not finite: learning cannot go on."""


def require_finite(outcomes: Params, what: str, *, step: int, kind: str, of: Sequence[int]) -> None:
    """Check the outcomes of episodes, which all workers have alike.

    Args:
        outcomes: by name, ``[E, ...]``.
        what: name of the numbers, such as "a loss or gradient".
        step: of the outer loop.
        kind: of the episodes, "training" or "validation".
        of: indices of the episodes.

    Raises:
        NotFiniteError: naming the first episode with an outcome that is not finite.
    """
    finite = torch.stack(
        [
            each.flatten(1).isfinite().all(1) if each.ndim > 1 else each.isfinite()
            for each in outcomes.values()
        ]
    ).all(0)
    if not finite.all():
        raise NotFiniteError(
            f"outer step {step}: {kind} episode {of[int((~finite).nonzero()[0, 0])]} gave {what}"
            " that is not finite",
            remedy="the last checkpoint is kept; lower inner.lr or outer.lr, or set"
            " outer.clip_norm, under another name",
        )
