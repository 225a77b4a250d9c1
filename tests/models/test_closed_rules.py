"""The closed rules of convolution, batch norm and max-pool beside PyTorch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.nn import functional as F

from raymaml.kernels.library import Kernels, usable
from raymaml.models.closed_rules.batch_norm import batch_norm
from raymaml.models.closed_rules.duals import (
    Conv2d,
    convolved_by_patches,
    max_pool,
    pooled_by_lines,
)
from raymaml.models.closed_rules.winograd import kernels_for

EPS = 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MOVING = [set(names) - {""} for names in product(["", "x"], ["", "weight"], ["", "bias"])]


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def derivatives(
    function: Callable[..., Tensor],
    values: dict[str, Tensor],
    moving: set[str],
    *,
    curved: bool = True,
) -> list[Tensor]:
    """Output, its tangent, then each gradient and its tangent, of a loss curved in the output."""
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value, drawn(*value.shape, seed=7).to(value.dtype))
            if name in moving
            else value
            for name, value in values.items()
        }
        out = function(**duals)
        toward = drawn(*out.shape, seed=2)
        loss = (toward * (out.sin() if curved else out)).sum()
        learned = [value for value in duals.values() if value.requires_grad]
        pairs = map(forward_ad.unpack_dual, (out, *torch.autograd.grad(loss, learned)))
        return [
            torch.zeros_like(pair.primal) if part is None else part
            for pair in pairs
            for part in (pair.primal, pair.tangent)
        ]


def of_a_norm(layout: torch.memory_format, *, needs_x: bool = True) -> dict[str, Tensor]:
    """Images, weights (some of which turn the images over) and biases."""
    x = (drawn(5, 6, 7, 4, seed=0) * 2 + 1).to(memory_format=layout)
    weight = drawn(6, seed=3).abs() + 0.5
    weight[::4] *= -1
    values = {"x": x, "weight": weight, "bias": drawn(6, seed=4)}
    return {name: v.requires_grad_(needs_x or name != "x") for name, v in values.items()}


def ours(x: Tensor, weight: Tensor, bias: Tensor, window: int = 1) -> Tensor:
    return batch_norm(x, weight, bias, EPS, window)[0]


def theirs(x: Tensor, weight: Tensor, bias: Tensor, window: int = 1) -> Tensor:
    x = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return F.max_pool2d(x, window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("window", [1, 2])  # a pool leaves out the last of 7 rows
@pytest.mark.parametrize(("curved", "needs_x"), [(True, True), (False, True), (True, False)])
def test_batch_norm_has_pytorchs_derivatives(
    layout: torch.memory_format, moving: set[str], window: int, curved: bool, needs_x: bool
) -> None:
    values = of_a_norm(layout, needs_x=needs_x)
    wanted = derivatives(partial(theirs, window=window), values, moving, curved=curved)
    found = derivatives(partial(ours, window=window), values, moving, curved=curved)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    values = of_a_norm(LAYOUTS[1])
    (grad,) = torch.autograd.grad(ours(**values).sin().sum(), values["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_summed_in_float32(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    types = {"x": dtype, "weight": torch.float32, "bias": torch.float32}
    values = {n: v.detach().to(types[n]).requires_grad_() for n, v in of_a_norm(layout).items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    toward = drawn(*values["x"].shape, seed=2).to(dtype)
    out, wanted = ours(**values), theirs(**exact)
    found = [out, *torch.autograd.grad(out, list(values.values()), toward)]
    wanted = [wanted, *torch.autograd.grad(wanted, list(exact.values()), toward.double())]
    rounding = torch.finfo(dtype).eps  # of what is stored; sums lose nothing
    for value, precise, kind in zip(found, wanted, [dtype, *types.values()], strict=True):
        assert value.dtype == kind
        assert relative_error(value, precise) < (rounding if kind == dtype else 1e-6)
    tangents = derivatives(ours, values, {"x"}, curved=False)
    assert [value.dtype for value in tangents[:4]] == [dtype] * 4


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


OPTIONS = [
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": 1, "groups": 2},
    {"padding": "same"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("channels", [(4, 6), (16, 32)])
def test_a_convolution_has_pytorchs_derivatives(
    layout: torch.memory_format,
    moving: set[str],
    *,
    options: dict[str, object],
    needs_x: bool,
    channels: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by the kernels, which take channels in multiples of 16, channels-last."""
    layer = Conv2d(*channels, 3, **options).double()
    x = drawn(3, channels[0], 6, 5, seed=1).to(memory_format=layout).requires_grad_(needs_x)

    def apply(x: Tensor, **own: Tensor) -> Tensor:
        return functional_call(layer, own, x)

    values = {"x": x, **dict(layer.named_parameters())}
    wanted = derivatives(apply, values, moving)
    layer.rules, layer.kernels = "closed", True
    taken: list[str] = []
    convolve = Kernels.convolve

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        taken.append("convolve")
        return convolve(*args, **kwargs)

    monkeypatch.setattr(Kernels, "convolve", counted)
    found = derivatives(apply, values, moving)
    fits = channels == (16, 32) and layout == torch.channels_last and options in OPTIONS[:2]
    assert bool(taken) == (fits and isinstance(usable(torch.float64), Kernels))
    unused: set[int] = set()
    if moving & values.keys() and layer.padding != "same":
        # nothing uses the value of a weight's gradient; nan cannot be mistaken for one
        unused = set(range(4 if needs_x else 2, len(found), 2))
        assert all(found[place].isnan().all() for place in unused)
    for place in set(range(len(found))) - unused:
        torch.testing.assert_close(found[place], wanted[place], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(
    "geometry", [(3, (1, 1), (1, 1)), (3, (2, 2), (1, 1)), (1, (2, 1), (0, 2))]
)
def test_the_product_of_patches_is_the_convolution(
    moving: set[str], geometry: tuple[int, tuple[int, int], tuple[int, int]]
) -> None:
    """Of three episodes with filters of their own: values, gradients and tangents."""
    size, stride, padding = geometry
    values = {
        "x": drawn(3, 2, 4, 7, 6, seed=1).requires_grad_(),
        "weight": drawn(3, 5, 4, size, size, seed=2).requires_grad_(),
        "bias": drawn(3, 5, seed=3).requires_grad_(),
    }

    def by_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return vmap(lambda *each: convolved_by_patches(*each, stride, padding))(x, weight, bias)

    def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        episodes = zip(x, weight, bias, strict=True)
        return torch.stack([F.conv2d(*each, stride, padding) for each in episodes])

    found, wanted = (derivatives(each, values, moving) for each in (by_patches, by_pytorch))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradgradcheck(by_patches, tuple(values.values()), fast_mode=True)


def test_with_few_pixels_a_channel_filters_are_not_transformed() -> None:
    few, enough = (torch.zeros(1, 64, 1, n).to(memory_format=LAYOUTS[1]) for n in (31, 32))
    weight, geometry = torch.zeros(64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    assert kernels_for(few, weight, geometry) is None
    if isinstance(usable(torch.float32), Kernels):
        assert kernels_for(enough, weight, geometry) is not None
    assert kernels_for(enough, weight, ((2, 2), (1, 1), (1, 1), 1)) is None
    assert kernels_for(enough.half(), weight.half(), geometry) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_pool_has_pytorchs_derivatives(layout: torch.memory_format, window: int) -> None:
    x = drawn(3, 4, 7, 6, seed=1).round()  # with ties, of which the first counts
    values = {"x": x.to(memory_format=layout).requires_grad_()}
    wanted = derivatives(lambda x: F.max_pool2d(x, window), values, {"x"})
    found = derivatives(partial(max_pool, window=window, rules="closed"), values, {"x"})
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("moving", [set(), {"x"}])
@pytest.mark.parametrize("window", [2, 3])
def test_two_maxima_are_a_max_pool(moving: set[str], window: int) -> None:
    """Also where values are equal: of whole numbers 0 to 2 most windows have several maxima."""
    generator = torch.Generator().manual_seed(0)
    for x in (
        torch.randint(0, 3, (2, 3, 7, 8), generator=generator).double(),
        drawn(2, 3, 7, 8, seed=1),
    ):
        values = {"x": x.requires_grad_()}
        found = derivatives(lambda x: pooled_by_lines(x, window), values, moving)
        wanted = derivatives(lambda x: F.max_pool2d(x, window), values, moving)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    broken = torch.tensor([[[[1.0, torch.nan], [2.0, 3.0]]]])
    assert pooled_by_lines(broken, 2).isnan().all()
