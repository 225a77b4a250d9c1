"""Batch norm by the batch's own moments, with closed forward-mode rules.

PyTorch has no rule for the forward derivative of batch norm's backward pass and spells it out in
dozens of passes over the images; and its kernel for the channels-last layout adds up in one float32
(measured: 30 to 80 times the rounding of the plain layout). Here each rule is written down, as few
multiply-adds with coefficients by channel, and sums are torch's, which are pairwise.

With ``d = x - mean``, ``r = 1 / sqrt(var + eps)``, ``s = weight * r`` and ``<a>`` the mean of ``a``
over B, H and W of a channel:

    out     = s d + bias
    grad_x  = s (g - <g> - r^2 <g d> d),    grad_weight = n r <g d>,    grad_bias = n <g>

and the derivatives of these lines along tangents ``x'``, ``weight'``, ``bias'`` and ``g'`` are

    d' = x' - <x'>,   r' = -r^3 <x' d>,   s' = weight' r + weight r'
    <g d>' = <g' d> + <g x'> - <g> <x'>
    out'    = s d' + s' d + bias'
    grad_x' = s (g' - <g'>) + s' (g - <g>) - (s r^2 <g d>)' d - s r^2 <g d> d'
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the moments of the batch; differentiable once backward, and forward over that.

    Args:
        x: ``[B, C, H, W]`` in either layout.
        weight, bias: ``[C]``.
        eps: added to the variance.

    Returns:
        What ``F.batch_norm`` gives, and the batch's mean and (biased) variance, which are not
        differentiated.
    """
    out, mean, var = _Forward.apply(x, weight, bias, eps)
    return out, mean, var


class _Tangents(NamedTuple):
    """What the forward derivative of the output leaves for that of the gradient."""

    x: Tensor | None
    x_mean: Tensor  # [C]
    rstd: Tensor  # [C]
    weight: Tensor  # [C]

    @classmethod
    def of_weight(cls, weight: Tensor) -> _Tangents:
        """Where the images do not move."""
        zero = torch.zeros_like(weight)
        return cls(x=None, x_mean=zero, rstd=zero, weight=weight)


class _Forward(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = _mean(x)
        centred = x - _by_channel(mean)
        var = _mean(centred * centred)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(centred, weight, rstd)
        ctx.save_for_forward(centred, weight, rstd)
        ctx.mark_non_differentiable(mean, var)
        ctx.tangents, ctx.dtype = None, x.dtype
        out = torch.addcmul(_by_channel(bias), centred, _by_channel(weight * rstd))
        return out.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_moments: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight, rstd = ctx.saved_tensors
        if ctx.tangents is not None:  # `_Backward.jvp` is called for the sake of some tangent only
            weight = forward_ad.make_dual(weight.detach(), ctx.tangents.weight)
        fixed = (centred, rstd, ctx.tangents, ctx.needs_input_grad[0])
        return (*_Backward.apply(grad, weight, fixed), None)

    @staticmethod
    def jvp(
        ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, _eps: None
    ) -> tuple[Tensor, None, None]:
        centred, own_weight, rstd = ctx.saved_tensors
        weight = torch.zeros_like(own_weight) if weight is None else weight
        shift = torch.zeros_like(own_weight) if bias is None else bias
        if x is None:
            ctx.tangents = _Tangents.of_weight(weight)
            out = torch.addcmul(_by_channel(shift), centred, _by_channel(weight * rstd))
            return out.to(ctx.dtype), None, None
        x_mean, rstd_tangent = _mean(x), -(rstd**3) * _mean(x * centred)
        ctx.tangents = _Tangents(x, x_mean, rstd_tangent, weight)
        scale, scale_tangent = own_weight * rstd, weight * rstd + own_weight * rstd_tangent
        out = torch.addcmul(_by_channel(shift - scale * x_mean), x, _by_channel(scale))
        return out.addcmul_(centred, _by_channel(scale_tangent)).to(x.dtype), None, None


class _Backward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor,
        fixed: tuple[Tensor, Tensor, _Tangents | None, bool],
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        centred, rstd, ctx.tangents, ctx.needs_x = fixed
        grad_mean, product = _mean(grad), _mean(grad * centred)
        ctx.save_for_forward(grad, centred, weight, rstd, grad_mean, product)
        scale, count = weight * rstd, centred.numel() // len(rstd)
        grad_x = None
        if ctx.needs_x:
            grad_x = torch.addcmul(_by_channel(-scale * grad_mean), grad, _by_channel(scale))
            grad_x.addcmul_(centred, _by_channel(-scale * rstd**2 * product))
            grad_x = grad_x.to(grad.dtype)
        return grad_x, count * rstd * product, count * grad_mean

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        own_grad, centred, weight, rstd, grad_mean, product = ctx.saved_tensors
        tangents = ctx.tangents or _Tangents.of_weight(torch.zeros_like(weight))
        grad = torch.zeros_like(own_grad) if grad is None else grad
        grad_mean_tangent, product_tangent = _mean(grad), _mean(grad * centred)
        if tangents.x is not None:
            product_tangent += _mean(own_grad * tangents.x) - grad_mean * tangents.x_mean
        count = centred.numel() // len(rstd)
        weight_tangent = count * (product_tangent * rstd + product * tangents.rstd)
        bias_tangent = count * grad_mean_tangent
        if not ctx.needs_x:
            return None, weight_tangent, bias_tangent
        scale = weight * rstd
        scale_tangent = tangents.weight * rstd + weight * tangents.rstd
        slope = scale * rstd**2 * product  # of grad_x in -d
        slope_tangent = rstd**2 * (scale_tangent * product + scale * product_tangent)
        slope_tangent += 2 * scale * rstd * tangents.rstd * product
        const = slope * tangents.x_mean - scale_tangent * grad_mean - scale * grad_mean_tangent
        out = torch.addcmul(_by_channel(const), grad, _by_channel(scale))
        out.addcmul_(own_grad, _by_channel(scale_tangent))
        out.addcmul_(centred, _by_channel(-slope_tangent))
        if tangents.x is not None:
            out.addcmul_(tangents.x, _by_channel(-slope))
        return out.to(own_grad.dtype), weight_tangent, bias_tangent


def _mean(x: Tensor) -> Tensor:
    """Average over B, H and W, in float32 at least."""
    return x.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _by_channel(x: Tensor) -> Tensor:
    return x[:, None, None]
