"""Running moments: what batch norm keeps from one meta-batch to the next (policy ``running``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from raymaml.layers import PassAware
from raymaml.types import Buffers


def lasting_layers(model: nn.Module) -> dict[str, PassAware]:
    """Return the layers whose moments outlive episodes, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PassAware) and module.outlives_episodes
    }


def lasting_buffers(model: nn.Module, buffers: Buffers) -> Buffers:
    """Pick what ``absorb`` needs of an episode's last buffers."""
    layers = lasting_layers(model)
    return {name: value for name, value in buffers.items() if name.rpartition(".")[0] in layers}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the running moments back, after the block, to what they were before it."""
    moments = lasting_buffers(model, dict(model.named_buffers()))
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
    ``kept * m + b``, with ``b`` of its own images alone. So episodes that all started from the
    model's moments can be put one behind the other, in their order, whoever computed them.

    Args:
        model: changed in place.
        episodes: ``mean``, ``var`` and ``kept`` of each layer after each episode.
    """
    for layer_name in lasting_layers(model):
        layer = model.get_submodule(layer_name)
        for name in ("mean", "var"):
            before = getattr(layer, name)
            now = before.clone()
            for buffers in episodes:
                kept, after = buffers[f"{layer_name}.kept"], buffers[f"{layer_name}.{name}"]
                now = kept * now + (after - kept * before)
            before.copy_(now)
