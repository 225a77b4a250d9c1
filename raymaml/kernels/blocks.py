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

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raymaml.kernels.library import Kernels, num_pixels


@dataclass(frozen=True)
class Numbers:
    """The parameters of a block, or their gradients, or tangents."""

    weight: Tensor  # [K, C, 3, 3]
    bias: Tensor  # [K], of the convolution
    scale: Tensor  # [K]
    shift: Tensor  # [K]


Moments = tuple[Tensor, Tensor]
"""Mean and biased variance, [K]."""


@dataclass(frozen=True)
class Norm:
    """The norm of a block: the number that it adds to the variance, and the moments that it goes
    by; None: those of the batch."""

    eps: float = 1e-5
    given: Moments | None = None


class Images:
    """Images that do not move, ``[B, c, H, W]``, c 1 or 3."""

    def __init__(self, kernels: Kernels, x: Tensor) -> None:
        self.kernels, self.count = kernels, num_pixels(x)
        self.is_even = x.shape[2] % 2 == x.shape[3] % 2 == 0
        self.padded = kernels.padded(x)

    @cached_property
    def patches(self) -> Tensor:
        """Covariance of the 3x3 patches, and below it their mean, [9c + 1, 9c]."""
        return self.kernels.patches(self.padded)

    def block(self, numbers: Numbers, norm: Norm, below: Tensor | None, order: int) -> Block:
        """Return a block on these images, or on the result of the block below."""
        if below is None:
            return FirstBlock(self.kernels, numbers, norm, self, order=order)
        return InnerBlock(self.kernels, numbers, norm, below, order=order)


class Block:
    """Batch norm, max-pool and ReLU behind a convolution, which subclasses bring.

    One object serves one pass over one set of images: it keeps the activations.

    Args:
        kernels: of the type of all tensors.
        numbers: the parameters.
        norm: by the batch, if derivatives of the gradient follow.
        order: highest derivative that follows, 0 to 2.
    """

    maxima: Tensor
    places: Tensor
    """In their windows, 0..3."""
    count: int
    """The number n of pixels behind the moments."""
    g: Tensor
    maxima_t: Tensor
    rows: Tensor
    """Numbers by channel, [9, K]; see ``Kernels``."""
    rows_t: Tensor

    def __init__(self, kernels: Kernels, numbers: Numbers, norm: Norm, order: int) -> None:
        self.kernels, self.numbers, self.norm, self.order = kernels, numbers, norm, order
        self.rows = kernels.rows(len(numbers.scale))

    def forward(self) -> Tensor:
        """Return the result ``[B, K, H // 2, W // 2]``."""
        numbers, norm = self.numbers, self.norm
        self._convolve()
        if norm.given is not None:
            mean, var = norm.given
            self.rows[0], self.rows[1] = mean - numbers.bias, var
        return self.kernels.norm_relu(
            self.maxima, numbers.scale, numbers.shift, norm.eps, self.rows
        )

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the gradient in the input, if it goes ``down``, and that in the parameters.

        The memory of ``grad`` is the block's from then on.
        """
        raise NotImplementedError

    def forward_along(self, x_t: Tensor | None, numbers_t: Numbers) -> Tensor:
        """Return the derivative of the result; ``x_t`` is None for an input that does not move."""
        self.rows_t = torch.empty_like(self.rows)
        self._convolve_along(x_t, numbers_t.weight)
        maxima, scale = (self.maxima, self.maxima_t), (self.numbers.scale, numbers_t.scale)
        rows = (self.rows, self.rows_t)
        return self.kernels.norm_relu_along(maxima, scale, numbers_t.shift, rows)

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """Return the derivatives of both gradients of ``backward``."""
        raise NotImplementedError

    def _convolve(self) -> None:
        """Set the maxima, their places, the count and the moments."""
        raise NotImplementedError

    def _convolve_along(self, x_t: Tensor | None, weight_t: Tensor) -> None:
        """Set the maxima', <x'> and <x' d>."""
        raise NotImplementedError

    @property
    def moments(self) -> Moments:
        """Mean and biased variance of the convolution's result, its bias included."""
        mean, var = self.rows[:2]
        return mean + self.numbers.bias, var

    def kept(self) -> list[Tensor]:
        """Return the tensors that the block holds."""
        return [each for each in vars(self).values() if isinstance(each, Tensor)]


class InnerBlock(Block):
    """A block of activations ``x`` [B, C, H, W], convolved by Winograd's algorithm to ``y``."""

    y: Tensor | None

    def __init__(
        self, kernels: Kernels, numbers: Numbers, norm: Norm, x: Tensor, *, order: int = 2
    ) -> None:
        super().__init__(kernels, numbers, norm, order)
        self.x, self.count = x, num_pixels(x)

    def _convolve(self) -> None:
        self.filters = self.kernels.filters(self.numbers.weight)
        self.y, (self.maxima, self.places) = self.kernels.convolve_and_pool(
            self.x, self.filters, self.numbers.scale, self.rows, keep=self.order > 0
        )

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """See ``Block``."""
        kernels, below = self.kernels, None
        assert self.y is not None
        grads = kernels.norm_relu_back(
            grad, self.maxima, self.count, self.rows, given=self.norm.given is not None
        )
        self.g = grad
        self.y_grad = kernels.norm_pool_grad(
            self.y, self.g, self.places, self.rows, keep=self.order > 1
        )
        if down:
            self.filters_back = kernels.filters(self.numbers.weight, turned=True)
            below = kernels.convolve(self.y_grad, self.filters_back)
        return below, Numbers(kernels.filter_grad(self.x, self.y_grad), *grads)

    def _convolve_along(self, x_t: Tensor | None, weight_t: Tensor) -> None:
        assert x_t is not None  # the block below moves
        assert self.y is not None
        self.x_t, self.weight_t = x_t, weight_t
        filters_t = self.kernels.filters(weight_t)
        self.y_t = self.kernels.convolve(x_t, self.filters, self.x, filters_t)
        self.maxima_t = self.kernels.maxima_along(
            (self.y, self.y_t), self.places, (self.rows, self.rows_t)
        )

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """See ``Block``."""
        kernels, rows, below = self.kernels, (self.rows, self.rows_t), None
        assert self.y is not None
        grads_t = kernels.norm_relu_back_along(
            grad_t, self.g, (self.maxima, self.maxima_t), self.count, rows
        )
        y_grad_t = kernels.norm_pool_grad_along(
            (self.y, self.y_t), (self.g, grad_t), self.places, rows
        )
        if down:
            filters_t = kernels.filters(self.weight_t, turned=True)
            below = kernels.convolve(y_grad_t, self.filters_back, self.y_grad, filters_t)
        weight_t = kernels.filter_grad(self.x, y_grad_t, self.x_t, self.y_grad)
        return below, Numbers(weight_t, *grads_t)


class FirstBlock(Block):
    """A block of images, whose convolution is never written down.

    With ``T`` the filters [K, 9c], ``m`` and ``Cov`` the moments of the patches p, the convolution
    has the mean ``T m`` and the variance ``diag(T Cov T^T)``. The gradient in T is s times the sum
    of g p over the maxima alone, less ``n s <g> m`` and ``n bend spread``, ``spread = T Cov``.

    Where no gradient follows, sums of the convolution cost less than the moments of the patches.

    Args:
        kernels: see ``Block``.
        numbers: see ``Block``.
        norm: see ``Block``.
        images: of the set.
        order: see ``Block``.
    """

    spread: Tensor | None = None
    """[9c, K]; None: the norm goes by given moments."""
    sums: Tensor | None = None
    """Of g p, [9c, K], for the derivatives of the gradient."""

    def __init__(
        self, kernels: Kernels, numbers: Numbers, norm: Norm, images: Images, *, order: int = 2
    ) -> None:
        super().__init__(kernels, numbers, norm, order)
        self.images, self.count = images, images.count

    def _convolve(self) -> None:
        kernels, images, numbers = self.kernels, self.images, self.numbers
        operands, rows = (images.padded, numbers.weight, numbers.scale), self.rows
        by_batch = self.norm.given is None
        if by_batch and self.order == 0 and images.is_even:
            self.maxima, self.places = kernels.first_maxima_and_moments(*operands, rows)
            return
        self.maxima, self.places = kernels.first_maxima(*operands)
        if by_batch:
            self.spread = kernels.first_moments(numbers.weight, images.patches, rows)

    def backward(self, grad: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """See ``Block``; images have no gradient."""
        moving = None if self.spread is None else (self.images.patches, self.spread)
        arguments = (self.images.padded, grad, (self.maxima, self.places), moving, self.rows)
        self.sums, grads, weight = self.kernels.first_back(*arguments, keep=self.order > 1)
        if self.order > 1:
            self.g = grad
        return None, Numbers(weight, *grads)

    def _convolve_along(self, x_t: Tensor | None, weight_t: Tensor) -> None:
        kernels, images = self.kernels, self.images
        assert self.spread is not None
        self.maxima_t = kernels.first_maxima_along(images.padded, weight_t, self.places)
        self.spread_t = kernels.first_moments_along(
            weight_t, images.patches, self.spread, self.rows_t
        )

    def backward_along(self, grad_t: Tensor, *, down: bool) -> tuple[Tensor | None, Numbers]:
        """See ``Block``."""
        assert self.spread is not None
        assert self.sums is not None
        grads_t, weight_t = self.kernels.first_back_along(
            self.images.padded,
            grad_t,
            self.g,
            (self.maxima, self.maxima_t, self.places),
            moving=(self.images.patches, self.spread, self.spread_t),
            sums=self.sums,
            rows=(self.rows, self.rows_t),
        )
        return None, Numbers(weight_t, *grads_t)
