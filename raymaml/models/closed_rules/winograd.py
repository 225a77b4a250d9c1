"""3x3 convolutions by the kernels, on pairs of a value and its tangent, by closed rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from raymaml.kernels.library import WIDTHS, Kernels, kernels_like, num_pixels
from raymaml.models.closed_rules.pairs import Pair, joined, only, pair

PIXELS = 0.5
"""Of as many pixels a channel on, the transforms of the filters are worth it."""
PLAIN = ((1, 1), (1, 1), (1, 1), 1)
"""Stride, padding, dilation and groups."""


def kernels_for(x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Kernels | None:
    """Return the kernels if they convolve images ``[B, C, H, W]`` of this type and layout by
    ``weight`` [K, C, 3, 3], and the process leaves that to one thread."""
    K, C, *sides = weight.shape
    if (
        sides == [3, 3]
        and geometry == PLAIN
        and not (C % WIDTHS or K % WIDTHS)
        and num_pixels(x) >= PIXELS * max(C, K)
        and x.dtype == weight.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return kernels_like(x)
    return None


class Winograd(Function):
    """(images, weight, bias, their tangents, kernels) -> the result and its tangent."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Pair:
        """Convolve."""
        x, weight, bias, x_tangent, weight_tangent, bias_tangent, ctx.kernels = args
        x_tangent, kernels = _laid_out(x_tangent), ctx.kernels
        ctx.save_for_backward(x, weight, x_tangent, weight_tangent)
        filters = kernels.filters(weight)
        out, tangent = kernels.convolve(x, filters), None
        if weight_tangent is None and bias_tangent is not None:
            weight_tangent = torch.zeros_like(weight)
        if weight_tangent is not None:
            filters_tangent = kernels.filters(weight_tangent)
            others = () if x_tangent is None else (x_tangent, filters)
            tangent = kernels.convolve(x, filters_tangent, *others)
        elif x_tangent is not None:
            tangent = kernels.convolve(x_tangent, filters)
        if tangent is not None:
            ctx.mark_non_differentiable(tangent)
        for each, added in ((out, bias), (tangent, bias_tangent)):
            if each is not None and added is not None:
                each.add_(added[:, None, None])
        return out, tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_tangent: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, with the derivatives of those that are used on."""
        (x, weight, x_tangent, weight_tangent), kernels = ctx.saved_tensors, ctx.kernels
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        primal, along = pair(grad)
        primal = primal.contiguous(memory_format=torch.channels_last)
        along = _laid_out(along)
        if along is None and (x_tangent is not None or weight_tangent is not None):
            along = torch.zeros_like(primal)
        x_grad = weight_grad = None
        if needs_x:
            filters = kernels.filters(weight, turned=True)
            x_grad = kernels.convolve(primal, filters)
            if along is not None:
                others: tuple[Tensor, ...] = ()
                if weight_tangent is not None:
                    others = (primal, kernels.filters(weight_tangent, turned=True))
                x_grad = joined(x_grad, kernels.convolve(along, filters, *others))
        if needs_weight and along is not None:
            others = () if x_tangent is None else (x_tangent, primal)
            weight_grad = only(kernels.filter_grad(x, along, *others))
        elif needs_weight:
            weight_grad = kernels.filter_grad(x, primal)
        bias_grad = None
        if needs_bias:
            bias_grad = primal.sum((0, 2, 3)) if along is None else only(along.sum((0, 2, 3)))
        return x_grad, weight_grad, bias_grad, None, None, None, None


def _laid_out(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)
