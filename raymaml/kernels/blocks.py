"""Blocks of a network in closed form: values, gradients, and the derivatives of both.

A block is convolution, batch norm by the batch, 2x2 max-pool and ReLU. It goes through four passes:

    forward          x        -> out
    backward         grad     -> x_grad, and the gradients in its parameters
    forward_along    x'       -> out'
    backward_along   grad'    -> x_grad', and the derivatives of those gradients

A step of gradient descent needs the first two. The last two go over the tape that these leave, and
make a product with the Hessian (Pearlmutter 1994). With ``d = x - mean``,
``r = 1 / sqrt(var + eps)``, ``s = scale r``, ``g`` the gradient behind the ReLU, which is zero but
at the maxima, and ``<a>`` the mean of ``a`` over the n pixels of a channel,

    out    = relu(s d + shift),          scale_grad = n r <g d>,   shift_grad = n <g>
    x_grad = s (g - <g>) - bend d,       bend = s r^2 <g d>

and the derivatives of these lines along tangents are

    r' = -r^3 <x' d>,   s' = scale' r + scale r',   <g d>' = <g' d> + <g x'> - <g> <x'>
    out'    = s (x' - <x'>) + s' d + shift'  where out > 0
    x_grad' = s (g' - <g'>) + s' (g - <g>) - bend' d - bend (x' - <x'>)

A bias of the convolution moves the mean alone: its gradient is zero.

Of a block whose norm goes by given moments, which are constants, the first two passes remain, with
``x_grad = s g``; the gradient of the bias is ``n s <g>``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from raymaml.kernels.library import Kernels, Line, Maxima, num_pixels


@dataclass(frozen=True)
class Numbers:
    """The parameters of a block, or their gradients, or tangents."""

    weight: Tensor  # [K, C, 3, 3]
    bias: Tensor  # [K], of the convolution
    scale: Tensor  # [K]
    shift: Tensor  # [K]


Moments = tuple[Tensor, Tensor]
"""Mean and biased variance, [K]."""


class Images:
    """Images that do not move, ``[B, c, H, W]``, c 1 or 3."""

    def __init__(self, kernels: Kernels, x: Tensor) -> None:
        self.kernels, self.count = kernels, num_pixels(x)
        self.is_even = x.shape[2] % 2 == x.shape[3] % 2 == 0
        self.padded = kernels.padded(x)

    @cached_property
    def patches(self) -> Moments:
        """Mean [9c] and covariance [9c, 9c] of the 3x3 patches."""
        gram = self.kernels.patch_gram(self.padded) / self.count
        mean = gram[-1, :-1]
        return mean, gram[:-1, :-1] - mean[:, None] * mean


@dataclass
class Tape:
    """The values that ``forward`` leaves and ``backward`` adds; those of channels are float64."""

    maxima: Maxima
    numbers: Tensor
    """r, s and shift - s mean, [3, K]."""
    count: int
    g: Tensor = field(init=False)
    back: Tensor = field(init=False)
    """<g>, <g d>, bend, and the constant of x_grad, which is that less bend x plus s g; [4, K]."""

    def __post_init__(self) -> None:
        _, self.s, shift = self.numbers.unbind()
        self.line: Line = self.s, shift

    def add(self, back: Tensor) -> None:
        """Add the values of ``backward``."""
        self.back = back
        self.g_mean, _, self.bend, self.constant = back.unbind()


@dataclass
class Moved:
    """The values that ``forward_along`` leaves and ``backward_along`` adds: tangents."""

    maxima: Tensor
    means: Tensor
    """<x'> and <x' d>, [2, K]."""
    numbers: Tensor = field(init=False)
    g: Tensor = field(init=False)

    def add(self, numbers: Tensor) -> None:
        """Add r', s' and (shift - s mean)'."""
        self.numbers = numbers
        _, self.s, shift = numbers.unbind()
        self.line: Line = self.s, shift

    def add_back(self, back: Tensor) -> None:
        """Add <g>', bend' and the constant'."""
        self.g_mean, self.bend, self.constant = back.unbind()


class Block:
    """Batch norm, max-pool and ReLU behind a convolution, which subclasses bring.

    One object serves one pass over one set of images: it keeps the tape.

    Args:
        kernels: of the type of all tensors.
        numbers: the parameters.
        eps: of the norm.
        given: moments that the norm goes by; None: those of the batch.
    """

    tape: Tape
    moved: Moved

    def __init__(
        self, kernels: Kernels, numbers: Numbers, eps: float, given: Moments | None
    ) -> None:
        self.kernels, self.numbers, self.eps, self.given = kernels, numbers, eps, given

    def _convolved(self) -> tuple[Maxima, int]:
        """Convolve; return the maxima and moments, and the number n of pixels."""
        raise NotImplementedError

    def _convolved_back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        """Return the gradients in the input, if it goes ``down``, and in the filters."""
        raise NotImplementedError

    def _convolved_along(self, x_t: Tensor | None, weight_t: Tensor) -> Moved:
        """Return the maxima', <x'> and <x' d>."""
        raise NotImplementedError

    def _convolved_back_along(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        """Return the derivatives of those gradients."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return the result ``[B, K, H // 2, W // 2]``."""
        maxima, count = self._convolved()
        if self.given is not None:
            mean, var = (each.double() for each in self.given)
            maxima = maxima._replace(mean=mean - self.numbers.bias, var=var)
        numbers = self.numbers
        line = self.kernels.norm_line(maxima, numbers.scale, numbers.shift, self.eps)
        self.tape = Tape(maxima, line, count)
        return self.kernels.affine_relu(maxima.values, self.tape.line)

    @property
    def moments(self) -> Moments:
        """Mean and biased variance of the convolution's result, its bias included."""
        return self.tape.maxima.mean + self.numbers.bias, self.tape.maxima.var

    @property
    def count(self) -> int:
        """The number n of pixels behind the moments."""
        return self.tape.count

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the gradient in the input, if it goes ``down``, and that in the parameters."""
        tape, sums = self.tape, self._masked(grad)
        # given moments do not move, as those of endlessly many pixels
        count = float(tape.count) if self.given is None else math.inf
        back, scale, shift = self.kernels.norm_line_back(
            sums, count, tape.maxima.mean, tape.numbers
        )
        tape.add(back)
        bias = torch.zeros_like(shift)
        if self.given is not None:
            bias = (tape.s * sums[0]).to(bias.dtype)
        x_grad, weight = self._convolved_back(down=down)
        return x_grad, Numbers(weight.to(bias.dtype), bias, scale, shift)

    def _masked(self, grad: Tensor) -> Tensor:
        """Put g on the tape; return the sums [2, C] of g and g d."""
        tape = self.tape
        tape.g, sums = self.kernels.relu_sums(grad, tape.maxima, tape.line)
        return sums

    def forward_along(self, x_t: Tensor | None, numbers_t: Numbers) -> Tensor:
        """Return the derivative of the result; ``x_t`` is None for an input that does not move.

        The norm goes by the batch.
        """
        tape, kernels, numbers = self.tape, self.kernels, self.numbers
        self.moved = self._convolved_along(x_t, numbers_t.weight)
        scales, mean = (numbers.scale, numbers_t.scale), tape.maxima.mean
        self.moved.add(
            kernels.norm_line_along(self.moved.means, mean, tape.numbers, scales, numbers_t.shift)
        )
        values = tape.maxima.values, self.moved.maxima
        return kernels.affine_relu_along(*values, tape.line, self.moved.line)

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the derivatives of both gradients of ``backward``."""
        tape, moved = self.tape, self.moved
        moved.g, sums = self.kernels.relu_sums_along(
            grad_t, tape.g, tape.maxima, moved.maxima, tape.line
        )
        means, lines = (tape.maxima.mean, moved.means[0]), (tape.numbers, tape.back, moved.numbers)
        back, scale, shift = self.kernels.norm_line_back_along(
            sums, float(tape.count), means, *lines
        )
        moved.add_back(back)
        x_grad, weight = self._convolved_back_along(down=down)
        return x_grad, Numbers(weight.to(scale.dtype), torch.zeros_like(shift), scale, shift)

    def kept(self) -> list[Tensor]:
        """Return the tensors that the block holds."""
        holders = (vars(self).values(), vars(self.tape).values(), self.tape.maxima)
        return [each for values in holders for each in values if isinstance(each, Tensor)]


class InnerBlock(Block):
    """A block of activations ``x`` [B, C, H, W], convolved by Winograd's algorithm."""

    def __init__(
        self, kernels: Kernels, numbers: Numbers, eps: float, given: Moments | None, x: Tensor
    ) -> None:
        super().__init__(kernels, numbers, eps, given)
        self.x = x

    def _convolved(self) -> tuple[Maxima, int]:
        self.filters = self.kernels.filters(self.numbers.weight)
        self.y = self.kernels.convolve(self.x, self.filters)
        return self.kernels.maxima(self.y, self.numbers.scale), num_pixels(self.y)

    def _convolved_back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        tape = self.tape
        self.y_grad = self.kernels.norm_pool_grad(
            self.y, tape.g, tape.maxima, constant=tape.constant, bend=tape.bend, scale=tape.s
        )
        below = None
        if down:
            self.filters_back = self.kernels.filters(self.numbers.weight, turned=True)
            below = self.kernels.convolve(self.y_grad, self.filters_back)
        return below, self.kernels.filter_grad(self.x, self.y_grad)

    def _convolved_along(self, x_t: Tensor | None, weight_t: Tensor) -> Moved:
        assert x_t is not None  # the block below moves
        self.x_t, self.weight_t = x_t, weight_t
        filters_t = self.kernels.filters(weight_t)
        self.y_t = self.kernels.convolve(self.x_t, self.filters, self.x, filters_t)
        maxima_t, means = self.kernels.maxima_along(self.y, self.y_t, self.tape.maxima)
        return Moved(maxima_t, means)

    def _convolved_back_along(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        tape, moved = self.tape, self.moved
        y_grad_t = self.kernels.norm_pool_grad_along(
            (self.y, self.y_t),
            (tape.g, moved.g),
            tape.maxima,
            constant_t=moved.constant,
            bends=(tape.bend, moved.bend),
            scales=(tape.s, moved.s),
        )
        below = None
        if down:
            filters_t = self.kernels.filters(self.weight_t, turned=True)
            below = self.kernels.convolve(y_grad_t, self.filters_back, self.y_grad, filters_t)
        return below, self.kernels.filter_grad(self.x, y_grad_t, self.x_t, self.y_grad)


class FirstBlock(Block):
    """A block of images, whose convolution is never written down.

    With ``T`` the filters [K, 9c], ``m`` and ``Cov`` the moments of the patches p, the convolution
    has the mean ``T m`` and the variance ``diag(T Cov T^T)``. The gradient in T is the sum of g p
    over the maxima alone, less ``<g> m`` and ``bend T Cov``.

    Where no gradient follows, sums of the convolution cost less than the moments of the patches.
    """

    def __init__(
        self,
        kernels: Kernels,
        numbers: Numbers,
        eps: float,
        given: Moments | None,
        images: Images,
        *,
        order: int = 2,
    ) -> None:
        super().__init__(kernels, numbers, eps, given)
        self.order = order
        self.images = images

    def _convolved(self) -> tuple[Maxima, int]:
        taps, scale, images = _by_tap(self.numbers.weight), self.numbers.scale, self.images
        by_channel = taps.T.contiguous()
        if self.order == 0 and self.given is None and images.is_even:
            found = self.kernels.first_maxima_and_moments(images.padded, by_channel, scale)
            return found, images.count
        values, places = self.kernels.first_maxima(images.padded, by_channel, scale)
        if self.given is not None:
            return Maxima(values, places, *self.given), images.count
        (patch_mean, cov), taps = images.patches, taps.double()
        self.spread = taps @ cov  # T Cov
        mean, var = taps @ patch_mean, (self.spread * taps).sum(1).clamp(min=0)
        return Maxima(values, places, mean, var), images.count

    def _convolved_back(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        tape = self.tape
        if self.given is not None:
            return None, self._as_filters(tape.s[:, None] * self.sums)
        around = (tape.s * tape.g_mean)[:, None] * self.images.patches[0]
        around = around + tape.bend[:, None] * self.spread
        return None, self._as_filters(tape.s[:, None] * self.sums - tape.count * around)

    def _masked(self, grad: Tensor) -> Tensor:
        tape = self.tape
        if self.order < 2:  # nothing needs g again
            sums_by_tap, sums = self.kernels.first_sums(
                self.images.padded, grad, tape.maxima, tape.line
            )
            self.sums = sums_by_tap.T
            return sums
        sums = super()._masked(grad)
        self.sums = self._patch_sums(tape.g)
        return sums

    def _convolved_along(self, x_t: Tensor | None, weight_t: Tensor) -> Moved:
        taps_t, (mean, cov) = _by_tap(weight_t), self.images.patches
        maxima_t = self.kernels.first_maxima_along(
            self.images.padded, taps_t.T.contiguous(), self.tape.maxima.places
        )
        taps_t = taps_t.double()
        self.spread_t = taps_t @ cov
        return Moved(maxima_t, torch.stack([taps_t @ mean, (taps_t * self.spread).sum(1)]))

    def _convolved_back_along(self, *, down: bool) -> tuple[Tensor | None, Tensor]:
        tape, moved = self.tape, self.moved
        sums_t = self._patch_sums(moved.g)
        mean = self.images.patches[0]
        around = (moved.s * tape.g_mean + tape.s * moved.g_mean)[:, None] * mean
        around = around + moved.bend[:, None] * self.spread + tape.bend[:, None] * self.spread_t
        grad = moved.s[:, None] * self.sums + tape.s[:, None] * sums_t - tape.count * around
        return None, self._as_filters(grad)

    def _patch_sums(self, g: Tensor) -> Tensor:
        places = self.tape.maxima.places
        return self.kernels.first_filter_sums(self.images.padded, g, places).T

    def _as_filters(self, taps: Tensor) -> Tensor:
        K, c, *_ = self.numbers.weight.shape
        return taps.reshape(K, 3, 3, c).permute(0, 3, 1, 2)


def _by_tap(weight: Tensor) -> Tensor:
    """``[K, c, 3, 3] -> [K, 9c]`` in the order row, column, channel, as patches are."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
