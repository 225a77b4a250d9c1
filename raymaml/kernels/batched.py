"""Blocks of several episodes at once, each with filters of its own, by batched matrix products.

The formulas are those of ``blocks.py``, in PyTorch, on any device. A convolution is the product of
all 3x3 patches of an episode's images, ``[n, 9C]``, with its filters, ``[9C, K]``; PyTorch's own
would be a grouped one, with a group for each episode. Nothing reads a value from the device.

Inside, the pixels of an episode are rows: ``[E, n, C]`` for n = B H W, ``[E, m, C]`` for the
m = B h w of pooled images.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.kernels.blocks import Norm, Numbers


class BatchedImages:
    """Images of several episodes, ``[E, B, c, H, W]``, that do not move."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def patches(self) -> Tensor:
        """The 3x3 patches, computed once for all passes."""
        return patches_of(self.x)

    def block(self, numbers: Numbers, norm: Norm, below: Tensor | None, order: int) -> BatchedBlock:
        """Return a block on these images, or on the result of the block below."""
        return BatchedBlock(numbers, norm, self if below is None else below, order=order)


class BatchedBlock:
    """Convolution, batch norm by the batch, 2x2 max-pool and ReLU; see ``blocks.Block``.

    Args:
        numbers: the parameters, each with a leading axis E.
        norm: by the batch.
        x: ``[E, B, C, H, W]``, or images.
        order: highest derivative that follows, 0 to 2.
    """

    def __init__(
        self, numbers: Numbers, norm: Norm, x: Tensor | BatchedImages, *, order: int
    ) -> None:
        assert norm.given is None
        self.numbers, self.eps, self.order = numbers, norm.eps, order
        self.images = x if isinstance(x, BatchedImages) else None
        self.x = x.x if isinstance(x, BatchedImages) else x

    def forward(self) -> Tensor:
        """Return the result ``[E, B, K, H // 2, W // 2]``."""
        numbers = self.numbers
        y = self._patches() @ columns(numbers.weight)
        d = y.sub_(y.mean(1, keepdim=True))
        self.n = d.shape[1]
        self.r = torch.rsqrt(d.square().mean(1, keepdim=True) + self.eps)
        self.s = numbers.scale[:, None] * self.r
        places = places_of_maxima(self._as_images(self.s * d))
        d_max = d.gather(1, places)
        # A ReLU, and not a comparison: what is no number stays so.
        out = torch.relu(self.s * d_max + numbers.shift[:, None])
        if self.order:
            self.d, self.d_max, self.places, self.out = d, d_max, places, out
        return self._as_images(out, pooled=True)

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the gradient in the input, if it goes ``down``, and that in the parameters."""
        n, r, s = self.n, self.r, self.s
        self.g = rows_of_pixels(grad) * (self.out > 0)
        self.g_mean = self.g.sum(1, keepdim=True) / n
        self.gd = (self.g * self.d_max).sum(1, keepdim=True) / n
        self.bend = s * r * r * self.gd
        self.y_grad = self._spread(s * self.g).sub_(s * self.g_mean).sub_(self.bend * self.d)
        weight = self._patches().mT @ self.y_grad
        below = self._turned(self.y_grad, self.numbers.weight) if down else None
        return below, self._grads(weight, n * r * self.gd, n * self.g_mean)

    def forward_along(self, x_t: Tensor | None, numbers_t: Numbers) -> Tensor:
        """Return the derivative of the result; ``x_t`` is None for an input that does not move."""
        numbers, r, s = self.numbers, self.r, self.s
        self.x_t, self.weight_t = x_t, numbers_t.weight
        y_t = self._patches() @ columns(numbers_t.weight)
        if x_t is not None:
            y_t.baddbmm_(patches_of(x_t), columns(numbers.weight))
        self.d_t = y_t.sub_(y_t.mean(1, keepdim=True))
        self.d_max_t = self.d_t.gather(1, self.places)
        self.r_t = -(r**3) * (self.d_t * self.d).mean(1, keepdim=True)
        self.s_t = numbers_t.scale[:, None] * r + numbers.scale[:, None] * self.r_t
        out_t = s * self.d_max_t + self.s_t * self.d_max + numbers_t.shift[:, None]
        return self._as_images(out_t * (self.out > 0), pooled=True)

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the derivatives of both gradients of ``backward``."""
        n, r, r_t, s, s_t = self.n, self.r, self.r_t, self.s, self.s_t
        g_t = rows_of_pixels(grad_t) * (self.out > 0)
        g_mean_t = g_t.sum(1, keepdim=True) / n
        gd_t = (g_t * self.d_max + self.g * self.d_max_t).sum(1, keepdim=True) / n
        bend_t = r * r * (s_t * self.gd + s * gd_t) + 2 * s * r * r_t * self.gd
        y_grad_t = self._spread(s * g_t + s_t * self.g).sub_(s * g_mean_t + s_t * self.g_mean)
        y_grad_t.sub_(bend_t * self.d).sub_(self.bend * self.d_t)
        weight_t = self._patches().mT @ y_grad_t
        if self.x_t is not None:
            weight_t.baddbmm_(patches_of(self.x_t).mT, self.y_grad)
        below = None
        if down:
            below = self._turned(y_grad_t, self.numbers.weight)
            below += self._turned(self.y_grad, self.weight_t)
        scale_t = n * (r_t * self.gd + r * gd_t)
        return below, self._grads(weight_t, scale_t, n * g_mean_t)

    def kept(self) -> list[Tensor]:
        """Return the tensors that the block holds; its input is the result of the one below."""
        own = {name: value for name, value in vars(self).items() if name != "x"}
        return [each for each in own.values() if isinstance(each, Tensor)]

    def _patches(self) -> Tensor:
        return patches_of(self.x) if self.images is None else self.images.patches

    def _as_images(self, rows: Tensor, *, pooled: bool = False) -> Tensor:
        """Return rows of pixels as images ``[E, B, K, H, W]``."""
        B, _, H, W = self.x.shape[1:]
        sizes = (B, H // 2, W // 2) if pooled else (B, H, W)
        images: Tensor = rows.unflatten(1, sizes)
        return images.movedim(-1, 2)

    def _spread(self, values: Tensor) -> Tensor:
        """Put values of the maxima at their places among zeros, ``[E, n, K]``."""
        return torch.zeros_like(self.d).scatter_(1, self.places, values)

    def _turned(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Take a gradient ``[E, n, K]`` back through the convolution, ``[E, B, C, H, W]``."""
        turned = weight.flip(-2, -1).transpose(1, 2)
        return self._as_images(patches_of(self._as_images(rows)) @ columns(turned))

    def _grads(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Numbers:
        """Return gradients by parameter; that of a bias before a norm by the batch is zero."""
        filters = weight.unflatten(1, (3, 3, -1)).permute(0, 4, 3, 1, 2)  # [E, K, C, 3, 3]
        return Numbers(filters, torch.zeros_like(self.numbers.bias), scale[:, 0], shift[:, 0])


def patches_of(x: Tensor) -> Tensor:
    """Return the 3x3 patches of images ``[E, B, C, H, W]``, zeros around: ``[E, n, 9C]``."""
    rows = F.pad(x.movedim(2, -1), (0, 0, 1, 1, 1, 1))  # [E, B, H + 2, W + 2, C]
    windows = rows.unfold(2, 3, 1).unfold(3, 3, 1)  # [E, B, H, W, C, 3, 3]
    return windows.movedim(4, -1).flatten(4).flatten(1, 3)


def columns(weight: Tensor) -> Tensor:
    """Return filters ``[E, K, C, 3, 3]`` as ``[E, 9C, K]``, in the order of ``patches_of``."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


def rows_of_pixels(x: Tensor) -> Tensor:
    """Return images ``[E, B, K, h, w]`` as ``[E, m, K]``."""
    return x.movedim(2, -1).flatten(1, 3)


def places_of_maxima(x: Tensor) -> Tensor:
    """Return the rows of pixels, ``[E, m, K]``, of the maxima of 2x2 windows of images
    ``[E, B, K, H, W]``; of equal ones the first."""
    x = x.movedim(2, -1)
    B, H, W = x.shape[1:4]
    h, w = H // 2, W // 2
    quarters = x[:, :, : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2))
    left_values, right_values = quarters.unbind(5)  # [E, B, h, 2, w, K]
    right = _is_larger(right_values, left_values)
    values = torch.where(right, right_values, left_values)
    lower = _is_larger(values[:, :, :, 1], values[:, :, :, 0])  # [E, B, h, w, K]
    right = torch.where(lower, right[:, :, :, 1], right[:, :, :, 0])
    image, line, pixel = (torch.arange(size, device=x.device) for size in (B, h, w))
    first = W * (H * image[:, None, None] + 2 * line[:, None]) + 2 * pixel  # [B, h, w]
    return (first[..., None] + W * lower + right).flatten(1, 3)


def _is_larger(a: Tensor, b: Tensor) -> Tensor:
    """Return where ``a`` is larger than ``b``; what is no number is."""
    return (a > b) | a.isnan()
