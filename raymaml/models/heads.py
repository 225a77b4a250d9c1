"""Classifiers on top of an encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """An encoder and a linear head: images ``[B, C, H, W]`` -> logits ``[B, N]``.

    The two parts are told apart by their names: everything under ``head.`` is the head.

    Args:
        encoder: images -> features ``[B, num_features]``.
        num_features: length of a feature vector.
        num_rows: rows of the head, N (or the one that a shared head repeats).
        temperature: what logits are multiplied by.
        learn_temperature: make it a meta-parameter, ``temperature``; it is never adapted.
    """

    temperature: Tensor | float
    head_start: str = "learned"
    """Where the head starts in each episode, as ``model.head`` of the configuration says it."""

    def __init__(
        self,
        encoder: nn.Module,
        num_features: int,
        num_rows: int,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, num_rows)
        self.temperature = (
            nn.Parameter(torch.tensor(temperature)) if learn_temperature else temperature
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score images."""
        logits: Tensor = self.head(self.encoder(x)) * self.temperature
        return logits
