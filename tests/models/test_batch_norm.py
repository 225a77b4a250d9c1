"""The closed rules of batch norm beside PyTorch's own derivatives and beside differences."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from raymaml.models.closed_rules.batch_norm import batch_norm

EPS = 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MOVING = [moving for moving in product([True, False], repeat=3) if any(moving)]
WINDOWS = [1, 2]
"""Without, and with a max-pool behind the norm, which leaves out the last of 7 rows."""


def inputs(layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, weights (some of which turn the images over) and biases."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 7, 4, generator=generator, dtype=torch.float64) * 2 + 1
    weight = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    weight[::4] *= -1
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    x = x.to(dtype).to(memory_format=layout)
    return [value.requires_grad_() for value in (x, weight, bias)]


def tangents(values: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values]


def ours(x: Tensor, weight: Tensor, bias: Tensor, window: int = 1) -> Tensor:
    return batch_norm(x, weight, bias, EPS, window)[0]


def theirs(x: Tensor, weight: Tensor, bias: Tensor, window: int = 1) -> Tensor:
    x = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return F.max_pool2d(x, window)


def derivatives(norm, values, moving, curved: bool) -> list[Tensor]:
    """Output, gradient, and the tangents of both, of a loss that is linear in the output or not."""
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(value, tangent.to(value.dtype)) if moves else value
            for value, tangent, moves in zip(values, tangents(values), moving, strict=True)
        ]
        out = norm(*duals)
        (toward,) = tangents([out], seed=2)
        loss = (toward * (out.sin() if curved else out)).sum()
        results = [out, *torch.autograd.grad(loss, duals)]
        pairs = [forward_ad.unpack_dual(result) for result in results]
        return [
            part if part is not None else torch.zeros_like(pair.primal)
            for pair in pairs
            for part in (pair.primal, pair.tangent)
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("curved", [True, False], ids=["curved", "linear"])
def test_all_derivatives_are_pytorchs(layout, moving, window: int, curved: bool) -> None:
    values = inputs(layout)
    wanted = derivatives(partial(theirs, window=window), values, moving, curved)
    found = derivatives(partial(ours, window=window), values, moving, curved)
    for value_found, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(value_found, value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_gradient_along_a_direction_is_a_central_difference(layout, window: int) -> None:
    norm = partial(ours, window=window)
    values = inputs(layout)
    (toward,) = tangents([norm(*values)], seed=2)
    directions = tangents(values)

    def gradient_at(step: float) -> list[Tensor]:
        moved = [
            (value.detach() + step * direction).requires_grad_()
            for value, direction in zip(values, directions, strict=True)
        ]
        return list(torch.autograd.grad((toward * norm(*moved).sin()).sum(), moved))

    step = 1e-5
    ends = zip(gradient_at(step), gradient_at(-step), strict=True)
    found = derivatives(norm, values, (True, True, True), curved=True)[3::2]
    for tangent, (after, before) in zip(found, ends, strict=True):
        torch.testing.assert_close(tangent, (after - before) / (2 * step), rtol=1e-6, atol=1e-6)


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    x, weight, bias = inputs(LAYOUTS[1])
    (grad,) = torch.autograd.grad(ours(x, weight, bias).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_images_may_need_no_gradient() -> None:
    x, *own = inputs(LAYOUTS[0])
    wanted = torch.autograd.grad(theirs(x.detach(), *own).sin().sum(), own)
    found = torch.autograd.grad(ours(x.detach(), *own).sin().sum(), own)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_moments_are_the_batchs() -> None:
    x, weight, bias = inputs(LAYOUTS[1])
    _, mean, var = batch_norm(x, weight, bias, EPS)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    assert not mean.requires_grad
    assert not var.requires_grad


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_summed_in_float32(layout, dtype: torch.dtype) -> None:
    values = [
        v.detach().to(t).requires_grad_()
        for v, t in zip(inputs(layout, dtype), (dtype, *[torch.float32] * 2), strict=True)
    ]
    exact = [value.detach().double().requires_grad_() for value in values]
    (toward,) = tangents(values[:1], seed=2)
    out, wanted = ours(*values), theirs(*exact)
    grads = torch.autograd.grad(out, values, toward.to(dtype))
    exact_grads = torch.autograd.grad(wanted, exact, toward.to(dtype).double())
    assert [value.dtype for value in (out, *grads)] == [dtype, dtype, torch.float32, torch.float32]
    rounding = torch.finfo(dtype).eps  # of what is stored; sums lose nothing
    assert relative_error(out, wanted) < rounding
    assert relative_error(grads[0], exact_grads[0]) < rounding
    assert relative_error(grads[1], exact_grads[1]) < 1e-6
    assert relative_error(grads[2], exact_grads[2]) < 1e-6
    tangent = derivatives(ours, values, (True, False, False), curved=False)
    assert [value.dtype for value in tangent[:4]] == [dtype] * 4


def test_channels_last_sums_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 8, 42, 42, generator=generator) * 2 + 1.5
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    toward = torch.randn(x.shape, generator=generator) + 0.1
    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    wanted = torch.autograd.grad(theirs(*exact), exact, toward.double())
    found = torch.autograd.grad(ours(x, weight, bias), (x, weight, bias), toward)
    for value, exact_value in zip(found, wanted, strict=True):
        assert relative_error(value, exact_value) < 1e-6  # PyTorch's kernel: 7e-6 to 6e-5
