"""Norm policies: whose moments normalise which pass (the table in the README)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransductiveNorm2d(nn.Module):
    """Batch norm by the moments of whatever batch passes, support or query, as the MAML paper.

    Nothing is accumulated, so nothing leaks from one episode to the next. The query pass uses the
    query batch's own moments: predictions depend on the other queries (transductive).

    Args:
        num_channels: C of the input ``[B, C, H, W]``.
        eps: added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` over B, H and W."""
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
