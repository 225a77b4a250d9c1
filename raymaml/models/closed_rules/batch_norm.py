"""Batch norm by the batch's own moments, and a max-pool behind it, with closed rules.

PyTorch has no rule for the forward derivative of batch norm's backward pass and spells it out in
dozens of passes over the images; and its kernel for the channels-last layout adds up in one float32
(measured: 30 to 80 times the rounding of the plain layout). Here each rule is a few multiply-adds
with coefficients by channel, and sums are torch's, which are pairwise.

With ``d = x - mean``, ``r = 1 / sqrt(var + eps)``, ``s = weight * r`` and ``<a>`` the mean of ``a``
over B, H and W of a channel, which has n entries:

    out    = s d + bias
    grad_x = s (g - <g> - r^2 <g d> d),    grad_weight = n r <g d>,    grad_bias = n <g>

and the derivatives of these lines along tangents ``x'``, ``weight'``, ``bias'`` and ``g'`` are

    d' = x' - <x'>,   r' = -r^3 <x' d>,   s' = weight' r + weight r'
    <g d>' = <g' d> + <g x'> - <g> <x'>
    out'    = s d' + s' d + bias'
    grad_x' = s (g' - <g'>) + s' (g - <g>) - (s r^2 <g d>)' d - s r^2 <g d> d'

Behind a max-pool ``out`` and ``out'`` are needed at the maxima alone, and ``g`` and ``g'`` are zero
elsewhere: whole images take part in the moments and in one sum a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from raymaml.models.closed_rules.duals import laid_out_as, pick, pooled, spread
from raymaml.models.closed_rules.pairs import joined, pair


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the moments of the batch; differentiable forward, and once backward over that.

    Args:
        x: ``[B, C, H, W]`` in either layout.
        weight, bias: ``[C]``.
        eps: added to the variance.
        window: side of the max-pool behind the norm; 1 is none.

    Returns:
        The result of ``F.batch_norm``, pooled, and the batch's mean and (biased) variance, which
        are not differentiated.
    """
    primals, (x_tangent, *own) = zip(pair(x), pair(weight), pair(bias), strict=True)
    if any(tangent is not None for tangent in (x_tangent, *own)):
        own = [torch.zeros_like(weight) if tangent is None else tangent for tangent in own]
    tangents = (x_tangent, *own)
    out, tangent, mean, var = _BatchNorm.apply(*primals, *tangents, eps, window)
    return joined(out, tangent), mean, var


def all_positive(weight: Tensor) -> bool:
    """Return whether a weight is known to be positive; of a GPU that would take a wait."""
    return weight.device.type == "cpu" and bool((weight > 0).all())


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        x, weight, bias, x_tangent, weight_tangent, bias_tangent, eps, window = args
        mean = _mean(x)
        centred = x - _by_channel(mean)
        var = _mean(centred * centred)
        rstd = torch.rsqrt(var + eps)
        at, where = centred, None  # d where out is needed, and the positions
        if window > 1:
            rising = all_positive(weight)
            at, where = pooled(centred if rising else centred * _by_channel(weight.sign()), window)
            at = at if rising else pick(centred, where)
        scale = weight * rstd
        out = torch.addcmul(_by_channel(bias), at, _by_channel(scale)).to(x.dtype)
        ctx.mark_non_differentiable(mean, var)
        ctx.dtype = x.dtype
        moving: tuple[Tensor | None, ...] = (None,) * 5
        tangent = None
        if weight_tangent is not None:
            x_mean = rstd_tangent = torch.zeros_like(rstd)
            x_at = None
            if x_tangent is not None:
                x_tangent = laid_out_as(centred, x_tangent)
                x_at = x_tangent if where is None else pick(x_tangent, where)
                x_mean = _mean(x_tangent)
                rstd_tangent = -(rstd**3) * _mean(x_tangent * centred)
            scale_tangent = weight_tangent * rstd + weight * rstd_tangent
            shift = _by_channel(bias_tangent - scale * x_mean)
            tangent = torch.addcmul(shift, at, _by_channel(scale_tangent))
            if x_at is not None:
                tangent.addcmul_(x_at, _by_channel(scale))
            tangent = tangent.to(x.dtype)
            ctx.mark_non_differentiable(tangent, mean, var)
            moving = (x_tangent, x_at, x_mean, rstd_tangent, scale_tangent)
        ctx.save_for_backward(centred, at, where, weight, rstd, *moving)
        return out, tangent, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        centred, at, where, weight, rstd, x_tangent, x_at, *moving = ctx.saved_tensors
        grad, grad_tangent = pair(grad)
        count = centred.numel() // len(rstd)
        scale = weight * rstd
        grad_mean, product = _sum(grad) / count, _sum(grad * at) / count
        weight_grad, bias_grad = count * rstd * product, count * grad_mean
        bend = scale * rstd**2 * product  # of grad_x in -d
        x_grad = None
        if ctx.needs_input_grad[0]:
            const = _by_channel(-scale * grad_mean)
            x_grad = torch.addcmul(const, centred, _by_channel(-bend))
            x_grad = _add(x_grad, where, grad, scale).to(ctx.dtype)
        if grad_tangent is None and moving[0] is None:
            return x_grad, weight_grad, bias_grad, *_NO_GRADS

        if grad_tangent is None:
            grad_tangent = torch.zeros_like(grad)
        none = torch.zeros_like(rstd)
        x_mean, rstd_tangent, scale_tangent = (none if v is None else v for v in moving)
        grad_mean_tangent = _sum(grad_tangent) / count
        product_tangent = _sum(grad_tangent * at) / count
        if x_at is not None:
            product_tangent += _sum(grad * x_at) / count - grad_mean * x_mean
        weight_tangent = count * (product_tangent * rstd + product * rstd_tangent)
        if x_grad is not None:
            bend_tangent = rstd**2 * (scale_tangent * product + scale * product_tangent)
            bend_tangent += 2 * scale * rstd * rstd_tangent * product
            const = bend * x_mean - scale_tangent * grad_mean - scale * grad_mean_tangent
            out = torch.addcmul(_by_channel(const), centred, _by_channel(-bend_tangent))
            if x_tangent is not None:
                out.addcmul_(x_tangent, _by_channel(-bend))
            _add(out, where, grad_tangent, scale)
            x_grad = joined(x_grad, _add(out, where, grad, scale_tangent).to(ctx.dtype))
        weight_grad = joined(weight_grad, weight_tangent)
        bias_grad = joined(bias_grad, count * grad_mean_tangent)
        return x_grad, weight_grad, bias_grad, *_NO_GRADS


_NO_GRADS = (None,) * 5  # in the tangents, which are constants, in eps and in window


def _add(x: Tensor, where: Tensor | None, grad: Tensor, scale: Tensor) -> Tensor:
    """Add ``scale * grad`` in place, at the positions of the gradient."""
    if where is None:
        return x.addcmul_(grad, _by_channel(scale))
    return spread(x, where, grad * _by_channel(scale))


def _mean(x: Tensor) -> Tensor:
    """Average over B, H and W, in float32 at least."""
    return x.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _by_channel(x: Tensor) -> Tensor:
    return x[:, None, None]
