"""The four-block convolutional encoder of Vinyals et al. 2016, used by the MAML paper."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.models.norm import TransductiveNorm2d

NUM_BLOCKS = 4


class ConvBlock(nn.Module):
    """3x3 convolution, norm, ReLU, 2x2 max-pool: ``[B, C, H, W] -> [B, width, H//2, W//2]``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.norm = TransductiveNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        # ReLU and maximum commute; after the pooling there is a quarter left to rectify.
        return F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))


class ConvNet4(nn.Module):
    """Four blocks, flattened: ``[B, C, H, W] -> [B, out_features]``.

    Args:
        in_channels: C of the images.
        image_size: H = W of the images, at least 16 (four poolings halve it four times).
        width: channels of every block.
    """

    def __init__(self, in_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, width)
        self.conv2 = ConvBlock(width, width)
        self.conv3 = ConvBlock(width, width)
        self.conv4 = ConvBlock(width, width)
        self.out_features = width * (image_size >> NUM_BLOCKS) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        features: Tensor = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return features.flatten(1)
