"""Pairs of a value and its tangent, PyTorch's dual numbers, taken apart and put together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

Pair = tuple[Tensor, Tensor | None]


def pair(x: Tensor) -> Pair:
    """Take a dual number apart; anything else has no tangent."""
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def joined(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """Put a dual number together."""
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def only(tangent: Tensor | None) -> Tensor | None:
    """Return a gradient with its tangent alone: nothing uses the value, which is nan."""
    if tangent is None:
        return None
    return joined(torch.full_like(tangent, torch.nan), tangent)
