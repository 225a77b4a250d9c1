"""Encoders: ConvNet4 of Vinyals et al. 2016, as in the MAML paper; ResNets (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.layers import PassAware
from raymaml.models.closed_rules.duals import Conv2d, MaxPool2d, max_pool

SLOPE = 0.1
"""Slope of ResNet-12's LeakyReLU below zero."""


class ConvBlock(nn.Module):
    """3x3 convolution, norm, ReLU, 2x2 max-pool: ``[B, C, H, W] -> [B, width, H//2, W//2]``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = self.conv(x)
        if isinstance(self.norm, PassAware):
            x = self.norm(x, 2)  # norm and pool in one
        else:
            x = max_pool(self.norm(x), 2, "torch")
        return F.relu(x)  # commutes with the maximum, and a quarter is left to rectify


class StridedBlock(nn.Module):
    """3x3 convolution of stride 2, norm, ReLU: halves H and W, rounding up.

    Zeros around the images are TensorFlow's SAME: one below and on the right, and where H or W is
    odd one above or on the left.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, width, kernel_size=3, stride=2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        height, width = x.shape[2:]
        return F.relu(self.norm(self.conv(F.pad(x, (width % 2, 1, height % 2, 1)))))


class ConvNet4(nn.Module):
    """Four blocks, flattened: ``[B, C, H, W] -> [B, widths[3] * (H//16) * (W//16)]``.

    Args:
        in_channels: C of the images, which are at least 16 pixels wide and high.
        widths: channels of the four blocks.
        strided: blocks of stride 2 and the mean over positions, ``[B, widths[3]]``, for images of
            any size: the network for Omniglot in cbfinn/maml.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], *, strided: bool = False) -> None:
        super().__init__()
        self.strided = strided
        block = StridedBlock if strided else ConvBlock
        self.conv1 = block(in_channels, widths[0])
        self.conv2 = block(widths[0], widths[1])
        self.conv3 = block(widths[1], widths[2])
        self.conv4 = block(widths[2], widths[3])

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        features: Tensor = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return features.mean(dim=(2, 3)) if self.strided else features.flatten(1)


class ConvNorm(nn.Module):
    """Convolution without bias that keeps ``H x W`` at stride 1, and its norm."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        out: Tensor = self.norm(self.conv(x))
        return out


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
    """The larger encoder of few-shot learning (Lee et al. 2019, without DropBlock).

    Four blocks and the mean over positions: ``[B, C, H, W] -> [B, widths[3]]``.

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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or a 1x1 shortcut where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, width, 3, stride)
        self.conv2 = ConvNorm(width, width, 3)
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else ConvNorm(in_channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem for small images, or its half, ResNet-10.

    Stem, four stages, the mean over positions: ``[B, C, H, W] -> [B, widths[3]]``. The stem keeps
    H and W, the last three stages halve them.

    Args:
        in_channels: C of the images.
        widths: channels of the four stages; the stem has those of the first.
        blocks: blocks a stage: 2 for ResNet-18, 1 for ResNet-10.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], blocks: int = 2) -> None:
        super().__init__()
        self.stem = ConvNorm(in_channels, widths[0], 3)
        self.layer1 = _stage(widths[0], widths[0], 1, blocks)
        self.layer2 = _stage(widths[0], widths[1], 2, blocks)
        self.layer3 = _stage(widths[1], widths[2], 2, blocks)
        self.layer4 = _stage(widths[2], widths[3], 2, blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        out = F.relu(self.stem(x))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return features.mean(dim=(2, 3))


def _stage(in_channels: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))
