"""The kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymaml.kernels.build import SOURCES, NoKernelsError, built
from raymaml.storage.cache import CACHE
from raymaml.storage.place import at_home

MOST_THREADS = 4
"""Kernels run on one thread: with more than these, PyTorch's own operations may be faster."""
WIDTHS = 16
"""Channels are multiples of this."""
REALS = {torch.float32: "float", torch.float64: "double"}


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in "BHWC"]


_TYPES = {"L": ctypes.c_long, "double": ctypes.c_double, "Shape": _Shape}
_ROWS = 9
"""Numbers by channel of a block, in lines.h, which names them; the mean and the variance first."""
Maxima = tuple[Tensor, Tensor]
"""The pooled maxima [B, C, h, w] of a convolution's result, and their places 0..3 in the windows,
of uint8."""
Pair = tuple[Tensor, Tensor]
"""A value and its tangent."""


class Kernels:
    """The kernels for numbers of one type.

    Images are ``[B, C, H, W]`` in the channels-last layout, with C a multiple of 16, but for those
    of the first layer. A kernel sets some of the ``rows`` of its block, of float64, and reads what
    earlier ones have set. Other results are new tensors, but where a method says "in place".
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        library = ctypes.CDLL(str(path))
        self._functions = {name: getattr(library, name) for name, _ in _declared()}
        for name, types in _declared():
            self._functions[name].argtypes = types

    def _call(self, name: str, *arguments: Tensor | _Shape | float | None) -> None:
        plain = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self._functions[name](*plain)

    def images(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for images ``[B, C, H, W]``."""
        return torch.empty(shape, dtype=dtype or self.dtype, memory_format=torch.channels_last)

    def rows(self, channels: int) -> Tensor:
        """Return room for the numbers by channel of a block, or of its tangent, [9, C]."""
        return torch.empty(_ROWS, channels, dtype=torch.float64)

    def _pooled(self, shape: _Shape) -> Maxima:
        values = self.images(shape.B, shape.C, shape.H // 2, shape.W // 2)
        return values, self.images(*values.shape, dtype=torch.uint8)

    # ------------------------------------------------------------------ norm, pool and ReLU
    def maxima_along(self, x: Pair, places: Tensor, rows: Pair) -> Tensor:
        """Return ``x'`` at the maxima, and set the means of x' and x' d, d = x - mean."""
        maxima_t = self.images(*places.shape)
        self._call("maxima_along", *x, _shape(x[0]), places, rows[0], maxima_t, rows[1])
        return maxima_t

    def norm_relu(
        self, maxima: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor
    ) -> Tensor:
        """Return ``out`` at the moments of ``rows``."""
        out = torch.empty_like(maxima)
        count, C = num_pixels(maxima), maxima.shape[1]
        self._call("norm_relu", maxima, count, C, scale, shift, eps, rows, out)
        return out

    def norm_relu_along(self, maxima: Pair, scale: Pair, shift_t: Tensor, rows: Pair) -> Tensor:
        """Return ``out'``."""
        out_t = torch.empty_like(maxima[0])
        count, C = num_pixels(out_t), out_t.shape[1]
        self._call("norm_relu_along", *maxima, count, C, *scale, shift_t, *rows, out_t)
        return out_t

    def norm_relu_back(
        self, grad: Tensor, maxima: Tensor, count: int, rows: Tensor, *, given: bool
    ) -> Tensor:
        """Turn ``grad`` into ``g`` in place; return the gradients [3, C] in the convolution's bias,
        in scale and in shift.

        Args:
            grad: that in ``out``.
            maxima: ``[B, C, h, w]``.
            count: pixels behind the moments.
            rows: of the block.
            given: whether its moments are constants.
        """
        C = grad.shape[1]
        grads = torch.empty(3, C, dtype=self.dtype)
        sizes = (num_pixels(grad), C, count)
        self._call("norm_relu_back", grad, maxima, *sizes, int(given), rows, grads)
        return grads

    def norm_relu_back_along(
        self, grad_t: Tensor, g: Tensor, maxima: Pair, count: int, rows: Pair
    ) -> Tensor:
        """Turn ``grad'`` into ``g'`` in place; return the derivatives of those gradients."""
        C = grad_t.shape[1]
        grads_t = torch.empty(3, C, dtype=self.dtype)
        sizes = (num_pixels(g), C, count)
        self._call("norm_relu_back_along", grad_t, g, *maxima, *sizes, *rows, grads_t)
        return grads_t

    def norm_pool_grad(
        self, x: Tensor, g: Tensor, places: Tensor, rows: Tensor, *, keep: bool = True
    ) -> Tensor:
        """Return the gradient in ``x``; without ``keep``, in place of ``x``."""
        x_grad = torch.empty_like(x) if keep else x
        self._call("norm_pool_grad", x, _shape(x), g, places, rows, x_grad)
        return x_grad

    def norm_pool_grad_along(self, x: Pair, g: Pair, places: Tensor, rows: Pair) -> Tensor:
        """Return the derivative of that gradient, in place of x'."""
        self._call("norm_pool_grad_along", *x, _shape(x[0]), *g, places, *rows)
        return x[1]

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

    def convolve_and_pool(
        self, x: Tensor, filters: Tensor, scale: Tensor, rows: Tensor, *, keep: bool = True
    ) -> tuple[Tensor | None, Maxima]:
        """Return ``convolve``, if asked to keep it, and the maxima of ``scale`` times it, pooled by
        2x2; set its moments."""
        B, _, H, W = x.shape
        y = self.images(B, len(scale), H, W) if keep else None
        maxima = self._pooled(_Shape(B, H, W, len(scale)))
        arguments = (x, filters, _shape(x), len(scale), scale, y, *maxima, rows)
        self._call("winograd_and_maxima", *arguments)
        return y, maxima

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

    def patches(self, padded: Tensor) -> Tensor:
        """Return the covariance of the 3x3 patches of images and their mean, [9c + 1, 9c].

        Args:
            padded: ``[B, H + 2, W + 2, c]``, c 1 or 3.
        """
        channels = padded.shape[3]
        found = torch.empty(9 * channels + 1, 9 * channels, dtype=torch.float64)
        self._call("first_patches", padded, channels, _inside(padded, 0), found)
        return found

    def first_moments(self, weight: Tensor, patches: Tensor, rows: Tensor) -> Tensor:
        """Set the moments of the convolution by ``weight``; return its ``spread``, [9c, C]."""
        C, channels = weight.shape[:2]
        spread = torch.empty(9 * channels, C, dtype=torch.float64)
        self._call("first_moments", weight, channels, C, patches, rows, spread)
        return spread

    def first_moments_along(
        self, weight_t: Tensor, patches: Tensor, spread: Tensor, rows_t: Tensor
    ) -> Tensor:
        """Set the means of x' and x' d; return ``spread'``."""
        C, channels = weight_t.shape[:2]
        spread_t = torch.empty_like(spread)
        arguments = (weight_t, channels, C, patches, spread, rows_t, spread_t)
        self._call("first_moments_along", *arguments)
        return spread_t

    def first_maxima(self, padded: Tensor, weight: Tensor, scale: Tensor) -> Maxima:
        """Convolve, and pool the maxima of ``scale * x``."""
        shape = _inside(padded, len(weight))
        values, places = self._pooled(shape)
        self._call("first_maxima", padded, padded.shape[3], shape, weight, scale, values, places)
        return values, places

    def first_maxima_and_moments(
        self, padded: Tensor, weight: Tensor, scale: Tensor, rows: Tensor
    ) -> Maxima:
        """As ``first_maxima``, for images of even sides; set the moments of x."""
        shape = _inside(padded, len(weight))
        values, places = self._pooled(shape)
        arguments = (padded, padded.shape[3], shape, weight, scale, values, places, rows)
        self._call("first_maxima_and_moments", *arguments)
        return values, places

    def first_maxima_along(self, padded: Tensor, weight_t: Tensor, places: Tensor) -> Tensor:
        """Return the convolution by ``weight_t`` at the maxima."""
        maxima_t, shape = self.images(*places.shape), _inside(padded, len(weight_t))
        self._call("first_maxima_along", padded, padded.shape[3], shape, weight_t, places, maxima_t)
        return maxima_t

    def first_back(
        self,
        padded: Tensor,
        grad: Tensor,
        maxima: Maxima,
        moving: Pair | None,
        rows: Tensor,
        *,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the sums of g times the patches around the maxima, [9c, C], if asked to keep them;
        the gradients of ``norm_relu_back``; that in the filters.

        Args:
            padded: the images.
            grad: that in ``out``, which becomes ``g`` if the sums are kept.
            maxima: with their places.
            moving: ``patches`` and ``spread``; None: the moments are constants.
            rows: of the block.
            keep: the sums.
        """
        shape, channels = _inside(padded, grad.shape[1]), padded.shape[3]
        sums = torch.empty(9 * channels, shape.C, dtype=torch.float64) if keep else None
        grads, weight = self._first_grads(shape.C, channels)
        norm = (int(moving is None), *(moving or (None, None)), rows)
        images = (padded, channels, shape, grad, *maxima)
        self._call("first_back", *images, *norm, sums, grads, weight)
        return sums, grads, weight

    def first_back_along(
        self,
        padded: Tensor,
        grad_t: Tensor,
        g: Tensor,
        maxima: tuple[Tensor, Tensor, Tensor],
        *,
        moving: tuple[Tensor, Tensor, Tensor],
        sums: Tensor,
        rows: Pair,
    ) -> Pair:
        """Turn ``grad'`` into ``g'`` in place; return the derivatives of the gradients of
        ``first_back``.

        Args:
            padded: the images.
            grad_t: the derivative of ``grad``.
            g: of ``first_back``.
            maxima: the maxima, their derivative and their places.
            moving: ``patches``, ``spread`` and ``spread'``.
            sums: of ``first_back``.
            rows: of the block and its tangent.
        """
        shape, channels = _inside(padded, grad_t.shape[1]), padded.shape[3]
        grads_t, weight_t = self._first_grads(shape.C, channels)
        images = (padded, channels, shape, grad_t, g, *maxima)
        self._call("first_back_along", *images, *moving, sums, *rows, grads_t, weight_t)
        return grads_t, weight_t

    def _first_grads(self, width: int, channels: int) -> Pair:
        grads = torch.empty(3, width, dtype=self.dtype)
        return grads, torch.empty(width, channels, 3, 3, dtype=self.dtype)


@cache
def _declared() -> list[tuple[str, list[Any]]]:
    """Return the kernels by name with the types of their arguments, as the sources declare them."""
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.[ch]*"))
    found = re.findall(r"^KERNEL (\w+)\(([^)]*)\)", text, re.MULTILINE)
    return [(name, [_as_c(each) for each in arguments.split(",")]) for name, arguments in found]


def _as_c(argument: str) -> Any:
    return ctypes.c_void_p if "*" in argument else _TYPES[argument.split(maxsplit=1)[0]]


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
