"""A user's own encoders, by import path: 16x16 images -> 4 features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# PyTorch's own, under a module of few files: all files of an encoder's package are read.
Linear, Identity, Flatten = nn.Linear, nn.Identity, nn.Flatten


class Plain(nn.Module):
    """Without random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 4)

    def forward(self, images: Tensor) -> Any:
        return torch.tanh(self.linear(images.flatten(1)))


class Smooth(Plain):
    """With dropout, and a buffer that counts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images: Tensor) -> Any:
        self.passes.add_(1)
        return F.dropout(super().forward(images) * (1 + 1 / self.passes), 0.2, self.training)


class Scales(Plain):
    """By its own lengths, which are left out of the derivative from a time on."""

    left_out = True

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.left_out):
            scale = features.abs().mean(0)
        return features / scale


class Attends(Plain):
    """Without a second derivative."""

    def forward(self, images: Tensor) -> Any:
        tokens = super().forward(images)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0]


class Grouped(Plain):
    """Without a forward derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, images: Tensor) -> Any:
        return self.norm(super().forward(images))


class Two(Plain):
    """In training a pair."""

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        return (features, features) if self.training else features
