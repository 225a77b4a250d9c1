"""Deterministic algorithms of PyTorch, and where they are not needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_any_order() -> Iterator[None]:
    """Let a GPU scatter values in any order: to places of their own, which gives the same bits.

    The deterministic algorithms for it sort the places, and wait for the device.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)
