"""Classifiers on top of an encoder."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """An encoder and a linear head: images ``[B, C, H, W]`` -> logits ``[B, N]``.

    The two parts are told apart by their names: everything under ``head.`` is the head.
    """

    def __init__(self, encoder: nn.Module, num_features: int, num_ways: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, num_ways)

    def forward(self, x: Tensor) -> Tensor:
        """Score images."""
        logits: Tensor = self.head(self.encoder(x))
        return logits
