"""The four-block convolutional encoder of Vinyals et al. 2016, used by the MAML paper."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.layers import PassAware
from raymaml.models.closed_rules.duals import Conv2d, max_pool


class ConvBlock(nn.Module):
    """3x3 convolution, norm, ReLU, 2x2 max-pool: ``[B, C, H, W] -> [B, width, H//2, W//2]``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        # ReLU and maximum commute; after the pooling there is a quarter left to rectify.
        return F.relu(norm_and_pool(self.norm, self.conv(x)))


def norm_and_pool(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise, then 2x2 max-pool: in one where the norm can."""
    out: Tensor = norm(x, 2) if isinstance(norm, PassAware) else max_pool(norm(x), 2, "torch")
    return out


class ConvNet4(nn.Module):
    """Four blocks, flattened: ``[B, C, H, W] -> [B, width * (H//16) * (W//16)]``.

    Args:
        in_channels: C of the images, which are at least 16 pixels wide and high.
        width: channels of every block.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, width)
        self.conv2 = ConvBlock(width, width)
        self.conv3 = ConvBlock(width, width)
        self.conv4 = ConvBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        features: Tensor = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return features.flatten(1)
