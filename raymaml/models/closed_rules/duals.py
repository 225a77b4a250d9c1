"""Layers on pairs of a value and its tangent, for derivatives forward over reverse.

In a pass along a direction every tensor that moves has a tangent beside it (PyTorch's dual
numbers), in the backward pass as well. PyTorch's rules for them are right, and slow in two places:
it convolves once more for the tangent of images that do not move, and in each gradient for a value
that nothing uses; and max-pool picks tangents element by element. These layers take the pairs
apart, compute both, and put them together again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from raymaml.common.determinism import in_any_order
from raymaml.layers import OwnRules, Rules
from raymaml.models.closed_rules.pairs import Pair, joined, only, pair
from raymaml.models.closed_rules.winograd import Winograd, kernels_for


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Conv2d(OwnRules, nn.Conv2d):
    """``nn.Conv2d``; its closed rules leave out every convolution that is not needed.

    Of several episodes on a GPU it is a batched matrix product; on a CPU PyTorch's grouped
    convolution is up to twice as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        zeros = self.padding_mode == "zeros" and isinstance(self.padding, tuple)
        by_patches = self.several and x.device.type != "cpu"
        if by_patches and zeros and self.groups == 1 and self.dilation == (1, 1):
            padding = cast(tuple[int, int], self.padding)
            return convolved_by_patches(x, self.weight, self.bias, self.stride, padding)
        if self.rules != "closed" or not zeros:
            return nn.Conv2d.forward(self, x)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(half), self.weight.to(half)
            bias = None if self.bias is None else self.bias.to(half)
        else:
            weight, bias = self.weight, self.bias
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        pairs = (pair(x), pair(weight), (None, None) if bias is None else pair(bias))
        primals, tangents = zip(*pairs, strict=True)
        kernels = kernels_for(x, weight, geometry) if self.kernels else None
        if kernels is not None:
            return joined(*Winograd.apply(*primals, *tangents, kernels))
        return joined(*_Convolution.apply(*primals, *tangents, geometry))


def convolved_by_patches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """Convolve ``[B, C, H, W]`` by the product of its patches with the filters.

    vmap over weights makes it a batched product, and ``F.conv2d`` a grouped convolution, with a
    group for each episode. PyTorch differentiates it to any order, forward and backward.
    """
    height, width = weight.shape[2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, height, stride[0]).unfold(3, width, stride[1])
    B, _, H, W = windows.shape[:4]
    patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(B * H * W, -1)
    rows = patches @ weight.flatten(1).mT
    rows = rows if bias is None else rows + bias
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Pair:
        x, weight, bias, x_tangent, weight_tangent, bias_tangent, ctx.geometry = args
        if weight_tangent is None and bias_tangent is not None:
            weight_tangent = torch.zeros_like(weight)
        ctx.save_for_backward(x, weight, x_tangent, weight_tangent)
        tangent = None
        if x_tangent is not None:
            tangent = F.conv2d(x_tangent, weight, None, *ctx.geometry)
        if weight_tangent is not None:
            along = F.conv2d(x, weight_tangent, bias_tangent, *ctx.geometry)
            tangent = _added(tangent, along)
        if tangent is not None:
            ctx.mark_non_differentiable(tangent)
        return F.conv2d(x, weight, bias, *ctx.geometry), tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_tangent: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_tangent, weight_tangent = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad, grad_tangent = pair(grad)
        if grad_tangent is None and x_tangent is None and weight_tangent is None:
            x_grad, weight_grad = _gradients(ctx, grad, x, weight, needs_x, needs_weight)
            bias_grad = grad.sum((0, 2, 3)) if needs_bias else None
            return x_grad, weight_grad, bias_grad, None, None, None, None
        if grad_tangent is None:
            grad_tangent = torch.zeros_like(grad)
        x_grad, _ = _gradients(ctx, grad, x, weight, needs_x, False)
        by_grad = _gradients(ctx, grad_tangent, x, weight, needs_x, needs_weight)
        by_weight = _gradients(ctx, grad, x, weight_tangent, needs_x, False)
        by_x = _gradients(ctx, grad, x_tangent, weight, False, needs_weight)
        x_grad = x_grad if x_grad is None else joined(x_grad, _added(by_grad[0], by_weight[0]))
        weight_grad = only(_added(by_grad[1], by_x[1]))
        bias_grad = only(grad_tangent.sum((0, 2, 3))) if needs_bias else None
        return x_grad, weight_grad, bias_grad, None, None, None, None


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor | None, *needed: bool
) -> list[Tensor | None]:
    """Return the needed gradients in images and weights; None where a factor is zero."""
    if x is None or weight is None or not any(needed):
        return [None, None]
    stride, padding, dilation, groups = ctx.geometry
    mask, none = [*needed, False], [0, 0]
    grads: list[Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, none, stride, padding, dilation, False, none, groups, mask
    )
    return grads[:2]


class MaxPool2d(OwnRules):
    """2x2 max-pool: ``[B, C, H, W] -> [B, C, H//2, W//2]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return max_pool(x, 2, self.rules)


def max_pool(x: Tensor, window: int, rules: Rules) -> Tensor:
    """Max-pool ``[B, C, H, W]`` by ``window x window`` (1: not at all)."""
    if window == 1:
        return x
    primal, tangent = pair(x) if rules == "closed" else (x, None)
    if tangent is None:
        on_gpu = x.device.type != "cpu"
        if on_gpu and torch.are_deterministic_algorithms_enabled():
            return pooled_by_lines(x, window)
        return F.max_pool2d(x, window)
    return joined(*_MaxPool.apply(primal, tangent, window))


def pooled_by_lines(x: Tensor, window: int) -> Tensor:
    """Max-pool ``[B, C, H, W]`` by two maxima: max-pool's backward pass adds up in any order."""
    height, width = (size // window for size in x.shape[-2:])
    x = x[..., : height * window, : width * window]
    lines: Tensor = x.unflatten(-1, (width, window)).max(-1).values
    found: Tensor = lines.unflatten(-2, (height, window)).max(-2).values
    return found


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tangent: Tensor, window: int) -> tuple[Tensor, Tensor]:
        out, where = pooled(x, window)
        tangent = pick(laid_out_as(x, tangent), where)
        ctx.save_for_backward(where)
        ctx.mark_non_differentiable(tangent)
        ctx.like = torch.empty_like(x, device="meta")
        return out, tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _tangent: Tensor) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        primal, tangent = (
            None if g is None else spread(torch.zeros_like(ctx.like, device=g.device), where, g)
            for g in pair(grad)
        )
        assert primal is not None
        return joined(primal, tangent), None, None


def pooled(x: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Max-pool a dense tensor ``[B, C, H, W]``.

    Returns:
        The maxima ``[B, C, h, w]``, and the position of each in the memory of ``x``.
    """
    out, in_plane = F.max_pool2d_with_indices(x, (window, window))
    by_image = torch.arange(x.shape[0], device=x.device)[:, None] * x.stride(0)
    by_channel = torch.arange(x.shape[1], device=x.device) * x.stride(1)
    return out, in_plane.mul_(x.stride(3)).add_((by_image + by_channel)[..., None, None])


def pick(x: Tensor, where: Tensor) -> Tensor:
    """Return the values in the memory of ``x`` at the positions ``where``."""
    return _memory(x).index_select(0, _memory(where)).as_strided(where.shape, where.stride())


def spread(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Add ``values`` in place to the memory of ``x`` at the positions ``where``, which differ."""
    with in_any_order():
        _memory(x).scatter_add_(0, _memory(where), _memory(laid_out_as(where, values.to(x.dtype))))
    return x


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with the strides of a dense tensor of its shape."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _memory(x: Tensor) -> Tensor:
    """Return a dense tensor as the vector in its memory."""
    return x.as_strided((x.numel(),), (1,))
