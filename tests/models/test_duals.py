"""Convolution and max-pool on dual numbers beside PyTorch's own rules."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.models.closed_rules.duals import Conv2d, max_pool

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tangents_of_gradients(function, values: dict[str, Tensor], moving: set[str]) -> list[Tensor]:
    """The output, its tangent, and the tangents of the gradients of a curved loss, in order."""
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(v, drawn(*v.shape, seed=7)) if name in moving else v
            for name, v in values.items()
        }
        out = function(duals)
        wanted = [value for value in duals.values() if value.requires_grad]
        grads = torch.autograd.grad(out.sin().sum(), wanted)
        found = [forward_ad.unpack_dual(value) for value in (out, *grads)]
        zero = torch.zeros((), dtype=torch.float64)
        return [found[0].primal, *(zero if f.tangent is None else f.tangent for f in found)]


def convolution(**options) -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(4, 6, 3, **options).double()


OPTIONS = [
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": 1, "groups": 2},
    {"padding": "same"},
]
MOVING = [set(names) for names in product(["", "x"], ["", "weight"], ["", "bias"])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("needs_x", [True, False])
def test_the_convolution_has_pytorchs_derivatives(layout, moving, options, needs_x: bool) -> None:
    layer = convolution(**options)
    values = dict(layer.named_parameters())
    x = drawn(3, 4, 6, 5, seed=1).to(memory_format=layout)
    values["x"] = x.requires_grad_() if needs_x else x

    def apply(duals: dict[str, Tensor]) -> Tensor:
        duals = dict(duals)
        return functional_call(layer, {n: v for n, v in duals.items() if n != "x"}, duals["x"])

    wanted = tangents_of_gradients(apply, values, moving)
    layer.rules = "closed"
    found = tangents_of_gradients(apply, values, moving)
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other.expand_as(value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_without_tangents_the_gradients_are_pytorchs(bias: bool) -> None:
    layer, x = convolution(padding=1, bias=bias), drawn(3, 4, 6, 5, seed=1).requires_grad_()
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).sin().sum(), inputs)
    layer.rules = "closed"
    found = torch.autograd.grad(layer(x).sin().sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_value_that_was_not_calculated_cannot_be_mistaken_for_one() -> None:
    layer, x = convolution(padding=1), drawn(3, 4, 6, 5, seed=1)
    layer.rules = "closed"
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(layer.weight.detach(), drawn(6, 4, 3, 3, seed=2))
        weight.requires_grad_()
        out = functional_call(layer, {"weight": weight}, x)
        (grad,) = torch.autograd.grad(out.sin().sum(), weight)
        assert forward_ad.unpack_dual(grad).primal.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_pool_has_pytorchs_derivatives(layout, window: int) -> None:
    x = drawn(3, 4, 7, 6, seed=1).round()  # with ties, of which the first counts
    values = {"x": x.to(memory_format=layout).requires_grad_()}
    wanted = tangents_of_gradients(lambda duals: F.max_pool2d(duals["x"], window), values, {"x"})
    ours = partial(max_pool, window=window, rules="closed")
    found = tangents_of_gradients(lambda duals: ours(duals["x"]), values, {"x"})
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
