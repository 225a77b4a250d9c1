"""Moments of norm layers that outlive episodes: the way from those of each episode to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from raymaml.layers import PassAware
from raymaml.types import Buffers


def running_layers(model: nn.Module) -> dict[str, PassAware]:
    """Return the layers by name whose moments outlive episodes (norm policy ``running``)."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PassAware) and module.outlives_episodes
    }


def running_moments(model: nn.Module, buffers: Buffers) -> Buffers:
    """Pick the running moments out of all buffers."""
    layers = running_layers(model)
    return {name: value for name, value in buffers.items() if name.rpartition(".")[0] in layers}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the running moments back, after the block, to their values before it."""
    moments = running_moments(model, dict(model.named_buffers()))
    before = {name: value.clone() for name, value in moments.items()}
    try:
        yield
    finally:
        for name, value in moments.items():
            value.copy_(before[name])


@torch.no_grad()
def absorb(model: nn.Module, episodes: Sequence[Buffers]) -> None:
    """Move the running moments as if the episodes had moved them one after the other.

    An exponential average is linear in its start: an episode takes the moments ``m`` to
    ``kept * m + b``, where ``b`` depends on its own images alone. So episodes that all started
    from the model's moments can follow one another, in their order, on any worker. Moments with a
    row an inner step, [T, C], have one ``kept`` a row, [T, 1].

    Args:
        model: changed in place.
        episodes: ``mean``, ``var`` and ``kept`` of each layer after each episode.
    """
    for layer_name, layer in running_layers(model).items():
        for name in ("mean", "var"):
            before = getattr(layer, name)
            now = before.clone()
            for buffers in episodes:
                kept, after = buffers[f"{layer_name}.kept"], buffers[f"{layer_name}.{name}"]
                now = kept * now + (after - kept * before)
            before.copy_(now)
