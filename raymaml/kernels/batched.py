"""Blocks of several episodes at once, each with filters of its own, by batched matrix products.

The formulas are those of ``blocks.py``, in PyTorch, on any device. A convolution is the product of
all 3x3 patches of an episode's images, ``[n, 9C]``, with its filters, ``[9C, K]``; PyTorch's own
would be a grouped one, with a group for each episode. Nothing reads a value from the device.

On a GPU memory is the limit, and not arithmetic. So patches are made once, a pass over all pixels
does as much as it can, and everything behind the maxima is a quarter of the size.

Inside, the pixels of an episode are rows: ``[E, n, C]`` for n = B H W, ``[E, m, C]`` for the
m = B h w of pooled images. A channel whose scale is negative has its filter and its scale turned
around, which changes no result: the maxima of the output are then those of the convolution.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.common.determinism import in_any_order
from raymaml.kernels.blocks import Moments, Norm, Numbers

MOST_POOLED = 2**31 - 1
"""Elements that PyTorch 2.9 pools in a call on a GPU."""
FEWEST_ROWS = 1024
"""Rows of a part of a product of rows: the sum of smaller ones costs more than it saves."""


class BatchedImages:
    """Images of several episodes, ``[E, B, c, H, W]``, that do not move."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def patches(self) -> Tensor:
        """The 3x3 patches, [E, n, 9c], computed once for all passes."""
        return patches_of(self.x)

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the patches, [E, 1, 9c]."""
        return self.patches.mean(1, keepdim=True)

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance of the patches, [E, 9c, 9c]."""
        centred = self.patches - self.mean
        return product_of_rows(centred, centred, len(self.x[0])) / centred.shape[1]

    def block(self, numbers: Numbers, norm: Norm, below: Tensor | None, order: int) -> BatchedBlock:
        """Return a block on these images, or on the result of the block below."""
        if below is None:
            return BatchedFirstBlock(numbers, norm, self, order=order)
        return BatchedInnerBlock(numbers, norm, below, order=order)


class BatchedBlock:
    """Batch norm, max-pool and ReLU behind a convolution, which subclasses bring.

    See ``blocks.Block``. ``mean`` and ``variance`` are those of the convolution without its bias.

    Args:
        numbers: the parameters, each with a leading axis E.
        norm: given moments are [E, K].
        x: ``[E, B, C, H, W]``.
        order: highest derivative that follows, 0 to 2.
    """

    mean: Tensor
    variance: Tensor
    d_max: Tensor
    """d at the maxima, [E, m, K]."""
    places: Tensor
    """The maxima's rows of pixels, [E, m, K]."""
    d_max_t: Tensor

    def __init__(self, numbers: Numbers, norm: Norm, x: Tensor, *, order: int) -> None:
        self.numbers, self.norm, self.x, self.order = numbers, norm, x, order
        self.num_images, self.count = x.shape[1], x[0, :, 0].numel()  # B and n
        self.sign = (1 - 2 * (numbers.scale < 0).to(x.dtype))[:, None]  # [E, 1, K]
        self.scale = self.sign * numbers.scale[:, None]
        self.filters = self.sign * columns(numbers.weight)
        if norm.given is not None:
            mean, variance = norm.given
            self.mean, self.variance = self.sign * (mean - numbers.bias)[:, None], variance[:, None]

    def forward(self) -> Tensor:
        """Return the result ``[E, B, K, H // 2, W // 2]``."""
        d_max, places = self._convolve()
        self.r = torch.rsqrt(self.variance + self.norm.eps)
        self.s = self.scale * self.r
        # A ReLU, and not a comparison: what is no number stays so.
        out = torch.relu(self.s * d_max + self.numbers.shift[:, None])
        if self.order:
            self.d_max, self.places, self.out = d_max, places, out
        return self._as_images(out, pooled=True)

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the gradient in the input, if it goes ``down``, and that in the parameters."""
        n, r, by_batch = self.count, self.r, self.norm.given is None
        self.g = rows_of_pixels(grad) * (self.out > 0)
        self.g_mean = self.g.sum(1, keepdim=True) / n
        self.gd = (self.g * self.d_max).sum(1, keepdim=True) / n
        scale, shift = n * r * self.gd, n * self.g_mean
        bias = torch.zeros_like(shift) if by_batch else self.sign * self.s * shift
        self.bend = self.s * r * r * self.gd
        if not by_batch:  # constants pull at nothing
            self.g_mean, self.bend = torch.zeros_like(shift), torch.zeros_like(shift)
        below, weight = self._back(down=down)
        return below, self._grads(weight, scale, shift, bias)

    def forward_along(self, x_t: Tensor | None, numbers_t: Numbers) -> Tensor:
        """Return the derivative of the result; ``x_t`` is None for an input that does not move."""
        scale_t, filters_t = numbers_t.scale[:, None], columns(numbers_t.weight)
        yd_t = self._convolve_along(x_t, self.sign * filters_t)
        self.r_t = -(self.r**3) * yd_t
        self.s_t = self.sign * scale_t * self.r + self.scale * self.r_t
        out_t = self.s * self.d_max_t + self.s_t * self.d_max + numbers_t.shift[:, None]
        return self._as_images(out_t * (self.out > 0), pooled=True)

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the derivatives of both gradients of ``backward``."""
        n, r, r_t, s, s_t = self.count, self.r, self.r_t, self.s, self.s_t
        g_t = rows_of_pixels(grad_t) * (self.out > 0)
        g_mean_t = g_t.sum(1, keepdim=True) / n
        gd_t = (g_t * self.d_max + self.g * self.d_max_t).sum(1, keepdim=True) / n
        bend_t = r * r * (s_t * self.gd + s * gd_t) + 2 * s * r * r_t * self.gd
        below, weight_t = self._back_along(g_t, g_mean_t, bend_t, down=down)
        scale_t, shift_t = n * (r_t * self.gd + r * gd_t), n * g_mean_t
        return below, self._grads(weight_t, scale_t, shift_t, torch.zeros_like(shift_t))

    def _convolve(self) -> tuple[Tensor, Tensor]:
        """Return d at the maxima, and their places; set the moments, unless they are given."""
        raise NotImplementedError

    def _back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        """Return the gradients in the input and in the filters, [E, 9C, K]."""
        raise NotImplementedError

    def _convolve_along(self, x_t: Tensor | None, filters_t: Tensor) -> Tensor:
        """Set the maxima'; return <x' d>, [E, 1, K]."""
        raise NotImplementedError

    def _back_along(
        self, g_t: Tensor, g_mean_t: Tensor, bend_t: Tensor, *, down: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the derivatives of the gradients of ``_back``."""
        raise NotImplementedError

    @property
    def moments(self) -> Moments:
        """Mean and biased variance of the convolution's result, its bias included, [E, K]."""
        return (self.sign * self.mean)[:, 0] + self.numbers.bias, self.variance[:, 0]

    def kept(self) -> list[Tensor]:
        """Return the tensors that the block holds; its input is the result of the one below."""
        own = {name: value for name, value in vars(self).items() if name != "x"}
        return [each for each in own.values() if isinstance(each, Tensor)]

    def _pooled(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maxima of 2x2 windows of ``y``, [E, n, K], and their rows of pixels."""
        images = self._as_images(y).flatten(0, 1)  # [E B, K, H, W]
        parts = images.split(max(1, MOST_POOLED // images[0].numel()))
        pooled = [F.max_pool2d(part, 2, return_indices=True) for part in parts]
        values, places = (
            pooled[0] if len(pooled) == 1 else map(torch.cat, zip(*pooled, strict=True))
        )
        values, places = (
            rows_of_pixels(each.unflatten(0, (-1, self.num_images))) for each in (values, places)
        )
        first = torch.arange(0, self.count, self.count // self.num_images, device=y.device)
        return values, places + first.repeat_interleave(values.shape[1] // len(first))[:, None]

    def _as_images(self, rows: Tensor, *, pooled: bool = False) -> Tensor:
        """Return rows of pixels as images ``[E, B, K, H, W]``."""
        H, W = self.x.shape[3:]
        sizes = (H // 2, W // 2) if pooled else (H, W)
        images: Tensor = rows.unflatten(1, (self.num_images, *sizes))
        return images.movedim(-1, 2)

    def _put(self, rows: Tensor, values: Tensor) -> Tensor:
        """Put values at the places of the maxima, in place; windows share no pixel."""
        with in_any_order():
            return rows.scatter_(1, self.places, values)

    def _product(self, patches: Tensor, rows: Tensor) -> Tensor:
        return product_of_rows(patches, rows, self.num_images)

    def _grads(self, weight: Tensor, scale: Tensor, shift: Tensor, bias: Tensor) -> Numbers:
        """Return gradients by parameter."""
        filters = (self.sign * weight).unflatten(1, (3, 3, -1)).permute(0, 4, 3, 1, 2)
        return Numbers(filters, bias[:, 0], (self.sign * scale)[:, 0], shift[:, 0])


class BatchedInnerBlock(BatchedBlock):
    """A block of activations."""

    def _convolve(self) -> tuple[Tensor, Tensor]:
        patches = patches_of(self.x)
        y = patches @ self.filters
        if self.norm.given is None:
            self.mean = y.mean(1, keepdim=True)
        d = y.sub_(self.mean)
        if self.norm.given is None:
            norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
            self.variance = norm.square() / self.count
        if self.order:
            self.patches, self.d = patches, d
        return self._pooled(d)

    def _back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        s = self.s
        self.y_grad = torch.addcmul(-s * self.g_mean, self.d, self.bend, value=-1)
        at_maxima = s * (self.g - self.g_mean) - self.bend * self.d_max
        self._put(self.y_grad, at_maxima)
        below = None
        if down:
            self.grad_patches = patches_of(self._as_images(self.y_grad))
            below = self._as_images(self.grad_patches @ turned(self.filters))
        return below, self._product(self.patches, self.y_grad)

    def _convolve_along(self, x_t: Tensor | None, filters_t: Tensor) -> Tensor:
        assert x_t is not None  # the block below moves
        self.filters_t, self.patches_t = filters_t, patches_of(x_t)
        self.y_t = torch.baddbmm(self.patches @ filters_t, self.patches_t, self.filters)
        self.mean_t = self.y_t.mean(1, keepdim=True)
        self.d_max_t = self.y_t.gather(1, self.places) - self.mean_t
        return (self.y_t * self.d).mean(1, keepdim=True)

    def _back_along(
        self, g_t: Tensor, g_mean_t: Tensor, bend_t: Tensor, *, down: bool
    ) -> tuple[Tensor | None, Tensor]:
        s, s_t, bend = self.s, self.s_t, self.bend
        constant = bend * self.mean_t - s * g_mean_t - s_t * self.g_mean
        y_grad_t = torch.addcmul(constant, self.d, bend_t, value=-1)
        y_grad_t.addcmul_(self.y_t, bend, value=-1)
        at_maxima = s * (g_t - g_mean_t) + s_t * (self.g - self.g_mean)
        at_maxima -= bend_t * self.d_max + bend * self.d_max_t
        self._put(y_grad_t, at_maxima)
        below = None
        if down:
            rows = patches_of(self._as_images(y_grad_t)) @ turned(self.filters)
            rows.baddbmm_(self.grad_patches, turned(self.filters_t))
            below = self._as_images(rows)
        weight_t = self._product(self.patches, y_grad_t)
        return below, weight_t + self._product(self.patches_t, self.y_grad)


class BatchedFirstBlock(BatchedBlock):
    """A block of images, whose convolution is not kept: see ``blocks.FirstBlock``.

    Args:
        numbers: see ``BatchedBlock``.
        norm: see ``BatchedBlock``.
        images: of the set.
        order: see ``BatchedBlock``.
    """

    def __init__(self, numbers: Numbers, norm: Norm, images: BatchedImages, *, order: int) -> None:
        super().__init__(numbers, norm, images.x, order=order)
        self.images = images

    def _convolve(self) -> tuple[Tensor, Tensor]:
        images, filters = self.images, self.filters
        self.spread = torch.zeros_like(filters)
        if self.norm.given is None:
            self.mean, self.spread = images.mean @ filters, images.covariance @ filters
            self.variance = (filters * self.spread).sum(1, keepdim=True)
        maxima, places = self._pooled(images.patches @ filters)
        return maxima - self.mean, places

    def _back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        self.sums = self._sums(self.g)
        dense = self.s * self.g_mean * self.images.mean.mT + self.bend * self.spread
        return None, self.s * self.sums - self.count * dense

    def _convolve_along(self, x_t: Tensor | None, filters_t: Tensor) -> Tensor:
        images = self.images
        maxima_t = (images.patches @ filters_t).gather(1, self.places)
        self.d_max_t = maxima_t - images.mean @ filters_t
        self.spread_t = images.covariance @ filters_t
        return (filters_t * self.spread).sum(1, keepdim=True)

    def _back_along(
        self, g_t: Tensor, g_mean_t: Tensor, bend_t: Tensor, *, down: bool
    ) -> tuple[Tensor | None, Tensor]:
        s, s_t = self.s, self.s_t
        dense = (s_t * self.g_mean + s * g_mean_t) * self.images.mean.mT
        dense += bend_t * self.spread + self.bend * self.spread_t
        return None, s_t * self.sums + s * self._sums(g_t) - self.count * dense

    def _sums(self, g: Tensor) -> Tensor:
        """Return the sums of g p over the maxima, [E, 9c, K]."""
        at_maxima = g.new_zeros(len(g), self.count, g.shape[-1])
        return self._product(self.images.patches, self._put(at_maxima, g))


def patches_of(x: Tensor) -> Tensor:
    """Return the 3x3 patches of images ``[E, B, C, H, W]``, zeros around: ``[E, n, 9C]``."""
    rows = F.pad(x.movedim(2, -1), (0, 0, 1, 1, 1, 1))  # [E, B, H + 2, W + 2, C]
    windows = rows.unfold(2, 3, 1).unfold(3, 3, 1)  # [E, B, H, W, C, 3, 3]
    return windows.movedim(4, -1).flatten(4).flatten(1, 3)


def columns(weight: Tensor) -> Tensor:
    """Return filters ``[E, K, C, 3, 3]`` as ``[E, 9C, K]``, in the order of ``patches_of``."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


def turned(filters: Tensor) -> Tensor:
    """Return the filters ``[E, 9K, C]`` that take a gradient back through those ``[E, 9C, K]``."""
    taps: Tensor = filters.unflatten(1, (9, -1))
    return taps.flip(1).mT.flatten(1, 2)


def product_of_rows(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Return ``a^T b`` for ``[E, n, A]`` and ``[E, n, B]``, as a sum over up to ``count`` parts of
    equal length: a GPU has enough to do at once."""
    rows = a.shape[1]
    fits = (n for n in range(count, 1, -1) if count % n == 0 and rows // n >= FEWEST_ROWS)
    parts = next(fits, 1)
    a, b = (each.unflatten(1, (parts, -1)) for each in (a, b))
    return (a.mT @ b).sum(1)


def rows_of_pixels(x: Tensor) -> Tensor:
    """Return images ``[E, B, K, h, w]`` as ``[E, m, K]``."""
    return x.movedim(2, -1).flatten(1, 3)
