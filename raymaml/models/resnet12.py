"""ResNet-12, the larger encoder of few-shot learning (Lee et al. 2019, without DropBlock)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.models.duals import MaxPool2d
from raymaml.models.resnet import ConvNorm

SLOPE = 0.1
"""Slope of LeakyReLU below zero."""


class Block12(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut, then 2x2 max-pool: halves H and W."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, width, 3)
        self.conv2 = ConvNorm(width, width, 3)
        self.conv3 = ConvNorm(width, width, 3)
        self.shortcut = ConvNorm(in_channels, width, 1)
        self.pool = MaxPool2d()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = F.leaky_relu(self.conv1(x), SLOPE)
        out = F.leaky_relu(self.conv2(out), SLOPE)
        # LeakyReLU and maximum commute; after the pooling there is a quarter left.
        return F.leaky_relu(self.pool(self.conv3(out) + self.shortcut(x)), SLOPE)


class ResNet12(nn.Module):
    """Four blocks and the mean over positions: ``[B, C, H, W] -> [B, widths[3]]``.

    Args:
        in_channels: C of the images, which are at least 16 pixels wide and high.
        widths: channels of the four blocks.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer1 = Block12(in_channels, widths[0])
        self.layer2 = Block12(widths[0], widths[1])
        self.layer3 = Block12(widths[1], widths[2])
        self.layer4 = Block12(widths[2], widths[3])

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features.mean(dim=(2, 3))
