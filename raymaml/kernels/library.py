"""The kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymaml.kernels.build import NoKernelsError, built
from raymaml.storage.cache import CACHE
from raymaml.storage.place import at_home

MOST_THREADS = 4
"""Kernels run on one thread: with more than these, PyTorch's own operations may be faster."""
WIDTHS = 16
"""Channels are multiples of this."""
REALS = {torch.float32: "float", torch.float64: "double"}


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in "BHWC"]


Line = tuple[Tensor, Tensor]
"""Scale and shift by channel, [C]."""


class Maxima(NamedTuple):
    """The pooled maxima of a convolution's result, and its moments."""

    values: Tensor  # [B, C, h, w]
    places: Tensor  # [B, C, h, w] of uint8, 0..3 in the window
    mean: Tensor  # [C], float64, as all moments and sums
    var: Tensor  # [C]


class Kernels:
    """The kernels for numbers of one type.

    Images are ``[B, C, H, W]`` in the channels-last layout, with C a multiple of 16, but for those
    of the first layer. Numbers by channel, [C], are float64. Results are new tensors.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments: Tensor | _Shape | float | None) -> None:
        getattr(self._library, name)(*map(_as_c, arguments))

    def images(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for images ``[B, C, H, W]``."""
        return torch.empty(shape, dtype=dtype or self.dtype, memory_format=torch.channels_last)

    def _pooled(self, shape: _Shape) -> tuple[Tensor, Tensor]:
        """Return room for the maxima of images, and for their places."""
        values = self.images(shape.B, shape.C, shape.H // 2, shape.W // 2)
        return values, self.images(*values.shape, dtype=torch.uint8)

    # ------------------------------------------------------------------ norm, pool and ReLU
    def maxima(self, x: Tensor, weight: Tensor) -> Maxima:
        """Pool the maxima of ``weight * x`` by 2x2, and take the moments of ``x``."""
        values, places = self._pooled(_shape(x))
        sums = torch.empty(2, x.shape[1], dtype=torch.float64)
        self._call("moments_and_maxima", x, _shape(x), weight, values, places, sums)
        mean, square = sums / num_pixels(x)
        var = (square - mean * mean).clamp_(min=0)
        return Maxima(values, places, mean + x[0, :, 0, 0], var)

    def affine_relu(self, maxima: Tensor, line: Line) -> Tensor:
        """Return ``out = relu(scale * maxima + shift)``."""
        out = torch.empty_like(maxima)
        self._call("affine_relu", maxima, num_pixels(maxima), maxima.shape[1], *line, out)
        return out

    def affine_relu_along(
        self, maxima: Tensor, maxima_t: Tensor, line: Line, line_t: Line
    ) -> Tensor:
        """Return the derivative of ``affine_relu``."""
        out_t = torch.empty_like(maxima)
        count = (num_pixels(maxima), maxima.shape[1])
        self._call("affine_relu_along", maxima, maxima_t, *count, *line, *line_t, out_t)
        return out_t

    def relu_sums(self, grad: Tensor, maxima: Maxima, line: Line) -> tuple[Tensor, Tensor]:
        """Return ``g``, which is ``grad`` where ``out`` > 0, and the sums [2, C] of g and of g d,
        d the maxima less the mean."""
        g, sums = torch.empty_like(grad), torch.empty(2, grad.shape[1], dtype=torch.float64)
        count = (num_pixels(grad), grad.shape[1])
        self._call("relu_sums", grad, maxima.values, *count, *line, maxima.mean, g, sums)
        return g, sums

    def relu_sums_along(
        self, grad_t: Tensor, g: Tensor, maxima: Maxima, maxima_t: Tensor, line: Line
    ) -> tuple[Tensor, Tensor]:
        """Return ``g'``, and the sums [3, C] of g', g' d and ``g * maxima'``."""
        g_t, sums = torch.empty_like(g), torch.empty(3, g.shape[1], dtype=torch.float64)
        images = (grad_t, g, maxima.values, maxima_t, num_pixels(g), g.shape[1])
        self._call("relu_sums_along", *images, *line, maxima.mean, g_t, sums)
        return g_t, sums

    def norm_pool_grad(
        self,
        x: Tensor,
        g: Tensor,
        maxima: Maxima,
        *,
        constant: Tensor,
        bend: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """Return ``constant - bend * x``, plus ``scale * g`` at the maxima."""
        x_grad = torch.empty_like(x)
        channels = (constant, bend, scale)
        self._call("norm_pool_grad", x, _shape(x), g, maxima.places, *channels, x_grad)
        return x_grad

    def maxima_along(self, x: Tensor, x_t: Tensor, maxima: Maxima) -> tuple[Tensor, Tensor]:
        """Return ``x'`` at the maxima, and the means [2, C] of x' and of x' d, d = x - mean."""
        maxima_t = torch.empty_like(maxima.values)
        sums = torch.empty(2, x.shape[1], dtype=torch.float64)
        self._call("maxima_along", x, x_t, _shape(x), maxima.places, maxima.mean, maxima_t, sums)
        return maxima_t, sums / num_pixels(x)

    def norm_pool_grad_along(
        self,
        x: tuple[Tensor, Tensor],
        g: tuple[Tensor, Tensor],
        maxima: Maxima,
        *,
        constant_t: Tensor,
        bends: tuple[Tensor, Tensor],
        scales: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return ``constant' - bend' * x - bend * x'``, plus ``scale * g' + scale' * g`` at the
        maxima; each pair is a value and its tangent."""
        (value, x_t), places = x, maxima.places
        x_grad_t = torch.empty_like(value)
        channels = (constant_t, *bends, *scales)
        self._call(
            "norm_pool_grad_along", value, x_t, _shape(value), *g, places, *channels, x_grad_t
        )
        return x_grad_t

    # ------------------------------------------------------------------ numbers by channel
    def norm_line(self, maxima: Maxima, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        """Return ``r``, ``s`` and ``shift - s mean``: [3, C] (names as in lines.h)."""
        rows = torch.empty(3, len(scale), dtype=torch.float64)
        self._call("norm_line", maxima.mean, maxima.var, scale, shift, eps, len(scale), rows)
        return rows

    def norm_line_back(
        self, sums: Tensor, count: float, mean: Tensor, line: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``g_mean``, ``product``, ``bend`` and ``constant``, [4, C]; the gradients in scale
        and shift."""
        C = len(mean)
        rows, grads = torch.empty(4, C, dtype=torch.float64), torch.empty(2, C, dtype=self.dtype)
        scale_grad, shift_grad = grads.unbind()
        self._call(
            "norm_line_back", sums, count, mean, line[0], line[1], C, rows, scale_grad, shift_grad
        )
        return rows, scale_grad, shift_grad

    def norm_line_along(
        self,
        means: Tensor,
        mean: Tensor,
        line: Tensor,
        scales: tuple[Tensor, Tensor],
        shift_t: Tensor,
    ) -> Tensor:
        """Return ``r'``, ``s'`` and ``(shift - s mean)'``, [3, C].

        ``means`` are <x'> and <x' d>, ``scales`` the scale and its tangent.
        """
        C = len(mean)
        rows = torch.empty(3, C, dtype=torch.float64)
        values = (*means.unbind(), mean, line[0], line[1], *scales, shift_t)
        self._call("norm_line_along", *values, C, rows)
        return rows

    def norm_line_back_along(
        self, sums: Tensor, count: float, means: tuple[Tensor, Tensor], *lines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``g_mean'``, ``bend'`` and ``constant'``, [3, C]; the derivatives of the gradients
        in scale and shift. ``means`` are those of x and x', ``lines`` the results of ``norm_line``,
        ``norm_line_back`` and ``norm_line_along``."""
        C = sums.shape[1]
        rows, grads = torch.empty(3, C, dtype=torch.float64), torch.empty(2, C, dtype=self.dtype)
        scale_grad, shift_grad = grads.unbind()
        results = (rows, scale_grad, shift_grad)
        self._call("norm_line_back_along", sums, count, *means, *lines, C, *results)
        return rows, scale_grad, shift_grad

    # ------------------------------------------------------------------ convolution
    def filters(self, weight: Tensor, *, turned: bool = False) -> Tensor:
        """Return filters ``[K, C, 3, 3]`` transformed for the convolution, ``[36, C, K]``; or
        turned, for its gradient in the images, ``[36, K, C]``."""
        K, C = weight.shape[:2]
        shape = (36, K, C) if turned else (36, C, K)
        strides = (C * K + 16, shape[2], 1)  # `padded` of winograd.h
        found = torch.empty_strided(shape, strides, dtype=self.dtype)
        self._call("winograd_filters", weight.contiguous(), C, K, int(turned), found)
        return found

    def convolve(
        self, x: Tensor, filters: Tensor, x2: Tensor | None = None, filters2: Tensor | None = None
    ) -> Tensor:
        """Convolve 3x3 with stride 1 and padding 1; of two pairs, return the sum."""
        B, _, H, W = x.shape
        y = self.images(B, filters.shape[2], H, W)
        self._call("winograd", x, filters, x2, filters2, _shape(x), y.shape[1], y)
        return y

    def filter_grad(
        self, x: Tensor, grad: Tensor, x2: Tensor | None = None, grad2: Tensor | None = None
    ) -> Tensor:
        """Return the gradient in the filters ``[K, C, 3, 3]``; of two pairs, the sum."""
        K, C = grad.shape[1], x.shape[1]
        found = torch.empty(K, C, 3, 3, dtype=self.dtype)
        self._call("winograd_filter_grad", x, grad, x2, grad2, _shape(x), K, found)
        return found

    # ------------------------------------------------------------------ the first layer
    def padded(self, x: Tensor) -> Tensor:
        """Return images ``[B, c, H, W]`` with zeros around them, ``[B, H + 2, W + 2, c]``."""
        B, c, H, W = x.shape
        shape = (B, H + 2, W + 2, c)
        room = torch.zeros(math.prod(shape) + 16, dtype=self.dtype)
        images = room[: math.prod(shape)].view(shape)
        images[:, 1:-1, 1:-1] = x.detach().permute(0, 2, 3, 1)
        return images

    def patch_gram(self, padded: Tensor) -> Tensor:
        """Return the sum of (p, 1)(p, 1)^T over the 3x3 patches p of images, [9c + 1, 9c + 1].

        Args:
            padded: ``[B, H + 2, W + 2, c]``, c 1 or 3.
        """
        gram = torch.empty(32, 32, dtype=torch.float64)
        self._call("first_gram", padded, padded.shape[3], _inside(padded, 0), gram)
        size = 9 * padded.shape[3] + 1
        return gram[:size, :size]

    def first_maxima(self, padded: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve by ``weight`` [9c, C]; return the maxima of ``scale * x`` and their places."""
        shape = _inside(padded, weight.shape[1])
        values, places = self._pooled(shape)
        arguments = (padded, padded.shape[3], shape, weight, scale, values, places)
        self._call("first_maxima", *arguments)
        return values, places

    def first_maxima_and_moments(self, padded: Tensor, weight: Tensor, scale: Tensor) -> Maxima:
        """As ``first_maxima``, for images of even sides, with the moments of x."""
        shape = _inside(padded, weight.shape[1])
        values, places = self._pooled(shape)
        sums = torch.empty(3, shape.C, dtype=torch.float64)
        arguments = (padded, padded.shape[3], shape, weight, scale, values, places, sums)
        self._call("first_maxima_and_sums", *arguments)
        mean, square = sums[:2] / (shape.B * shape.H * shape.W)
        sign = 1 - 2 * (scale < 0).double()
        return Maxima(values, places, sign * (mean + sums[2]), (square - mean * mean).clamp_(min=0))

    def first_maxima_along(self, padded: Tensor, weight_t: Tensor, places: Tensor) -> Tensor:
        """Return the convolution by ``weight_t`` [9c, C] at the maxima."""
        shape = _inside(padded, weight_t.shape[1])
        maxima_t = self.images(*places.shape)
        self._call("first_maxima_along", padded, padded.shape[3], shape, weight_t, places, maxima_t)
        return maxima_t

    def first_filter_sums(self, padded: Tensor, g: Tensor, places: Tensor) -> Tensor:
        """Return the sums [9c, C] of g times the patches around the maxima."""
        shape = _inside(padded, g.shape[1])
        sums = torch.empty(9 * padded.shape[3], g.shape[1], dtype=torch.float64)
        self._call("first_filter_sums", padded, padded.shape[3], shape, g, places, sums)
        return sums

    def first_sums(
        self, padded: Tensor, grad: Tensor, maxima: Maxima, line: Line
    ) -> tuple[Tensor, Tensor]:
        """Return ``first_filter_sums`` of g, and its sums as ``relu_sums``, without writing g."""
        shape = _inside(padded, grad.shape[1])
        found = torch.empty(9 * padded.shape[3], shape.C, dtype=torch.float64)
        sums = torch.empty(2, shape.C, dtype=torch.float64)
        images = (padded, padded.shape[3], shape, grad, maxima.values)
        self._call("first_sums", *images, *line, maxima.mean, maxima.places, found, sums)
        return found, sums


def _as_c(argument: Tensor | _Shape | float | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, _Shape) or argument is None:
        return argument
    return ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def _shape(x: Tensor) -> _Shape:
    B, C, H, W = x.shape
    return _Shape(B, H, W, C)


def _inside(padded: Tensor, channels: int) -> _Shape:
    B, H, W, _ = padded.shape
    return _Shape(B, H - 2, W - 2, channels)


def num_pixels(x: Tensor) -> int:
    """Return the number of pixels of images ``[B, C, H, W]``."""
    return x.numel() // x.shape[1]


@cache
def kernels(dtype: torch.dtype) -> Kernels:
    """Return the kernels for float32 or float64, built at the first call (2 to 6 s).

    Raises:
        NoKernelsError: they cannot be built or loaded here.
    """
    try:
        return Kernels(built(REALS[dtype], at_home(CACHE) / "kernels"), dtype)
    except OSError as error:  # a compiler for another machine, a folder that must not hold programs
        raise NoKernelsError(f"they cannot be built or loaded: {error}") from error


def kernels_like(x: Tensor) -> Kernels | None:
    """Return the kernels for tensors like ``x``; None if there are none, or if the process has so
    many threads that PyTorch may be faster. The first call of a process may build them."""
    if x.device.type != "cpu" or x.dtype not in REALS or torch.get_num_threads() > MOST_THREADS:
        return None
    found = usable(x.dtype)
    return found if isinstance(found, Kernels) else None


@cache
def usable(dtype: torch.dtype) -> Kernels | NoKernelsError:
    """Return ``kernels(dtype)``, or why there are none; it is tried once in a process."""
    try:
        return kernels(dtype)
    except NoKernelsError as error:
        return error
