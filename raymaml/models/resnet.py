"""What the residual encoders share (He et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from raymaml.models.duals import Conv2d


class ConvNorm(nn.Module):
    """Convolution without bias that keeps ``H x W`` at stride 1, and its norm."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        out: Tensor = self.norm(self.conv(x))
        return out
