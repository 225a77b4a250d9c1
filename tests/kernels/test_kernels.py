"""Each kernel against PyTorch in float64, over shapes: odd sizes, one image, all widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from raymaml.kernels.build import NoKernelsError
from raymaml.kernels.library import Kernels, kernels

ERRORS = {torch.float64: 1e-12, torch.float32: 3e-5}
"""Largest error over the largest number of a result: ten times the largest seen."""


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["double", "float"])
def built(request: pytest.FixtureRequest) -> Kernels:
    try:
        return kernels(request.param)
    except NoKernelsError as error:
        pytest.skip(f"no kernels: {error}")


SHAPES = st.tuples(
    st.integers(1, 5),  # images
    st.sampled_from([16, 32, 48, 64, 96]),  # channels
    st.integers(1, 97),  # height
    st.integers(1, 24),  # width
    st.integers(0, 2**31),  # seed
)
WIDTHS = st.sampled_from([16, 32, 48, 64, 96])
many = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def draw(*shape: int) -> Tensor:
    """Numbers of float64 that float32 holds exactly."""
    return torch.randn(*shape).double()


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, terms: float = 1) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        scale = float(wanted.abs().max()) or 1.0
        assert float((found - wanted).abs().max()) <= ERRORS[dtype] * terms * scale


@given(SHAPES, WIDTHS)
@many
def test_convolution(built: Kernels, shape: tuple[int, ...], width: int) -> None:
    (B, C, H, W, seed), K = shape, width
    torch.manual_seed(seed)
    (x, x2), (w, w2) = ((draw(B, C, H, W), draw(B, C, H, W)), (draw(K, C, 3, 3), draw(K, C, 3, 3)))
    dy, dy2 = draw(B, K, H, W), draw(B, K, H, W)
    real = {id(t): channels_last(t.to(built.dtype)) for t in (x, x2, dy, dy2)}
    weights = [each.to(built.dtype) for each in (w, w2)]
    one, two = ([built.filters(w, turned=turned) for turned in (False, True)] for w in weights)
    wanted = F.conv2d(x, w, padding=1)
    close(built.convolve(real[id(x)], one[0]), wanted, built.dtype)
    wanted = wanted + F.conv2d(x2, w2, padding=1)
    close(built.convolve(real[id(x)], one[0], real[id(x2)], two[0]), wanted, built.dtype)
    wanted = torch.nn.grad.conv2d_input(x.shape, w, dy, padding=1)
    close(built.convolve(real[id(dy)], one[1]), wanted, built.dtype)
    wanted = torch.nn.grad.conv2d_weight(x, w.shape, dy, padding=1)
    close(built.filter_grad(real[id(x)], real[id(dy)]), wanted, built.dtype)
    wanted = wanted + torch.nn.grad.conv2d_weight(x2, w.shape, dy2, padding=1)
    pairs = (real[id(x)], real[id(dy)], real[id(x2)], real[id(dy2)])
    close(built.filter_grad(*pairs), wanted, built.dtype)


def places_of(indices: Tensor, width: int) -> Tensor:
    """Places 0..3 in their windows of positions in the plane."""
    return indices // width % 2 * 2 + indices % width % 2


@given(SHAPES)
@many
def test_norm_and_pool(built: Kernels, shape: tuple[int, ...]) -> None:
    B, C, H, W, seed = shape
    torch.manual_seed(seed)
    dtype = built.dtype
    x, x_t = draw(B, C, H, W) + 3, draw(B, C, H, W)
    scale, *channels = (draw(C) for _ in range(6))
    images, images_t = channels_last(x.to(dtype)), channels_last(x_t.to(dtype))
    x = images.double()
    found = built.maxima(images, scale.to(dtype))
    close(found.mean, x.mean((0, 2, 3)), dtype)
    close(found.var, x.var((0, 2, 3), correction=0), dtype)
    if H < 2 or W < 2:
        assert found.values.numel() == 0
        return
    sign = scale.sign()[:, None, None]
    wanted, indices = F.max_pool2d_with_indices(x * sign, 2)
    assert torch.equal(found.values.double(), wanted * sign)
    assert torch.equal(found.places.long(), places_of(indices, W))

    def by_channel(v: Tensor) -> Tensor:
        return v[:, None, None]

    def spread(g: Tensor) -> Tensor:
        return (
            torch.zeros(B, C, H * W)
            .double()
            .scatter_(2, indices.flatten(2), g.flatten(2))
            .view(B, C, H, W)
        )

    mean = x.mean((0, 2, 3))
    found_t, means = built.maxima_along(images, images_t, found)
    assert torch.equal(
        found_t.double(), x_t.flatten(2).gather(2, indices.flatten(2)).view_as(wanted)
    )
    close(means[0], x_t.mean((0, 2, 3)), dtype, 10)
    close(means[1], (x_t * (x - by_channel(mean))).mean((0, 2, 3)), dtype, 100)

    values, values_t = found.values.double(), found_t.double()
    s, shift, s_t, shift_t, slope = channels
    out = built.affine_relu(found.values, (s, shift))
    line = values * by_channel(s) + by_channel(shift)
    close(out, line.clamp(min=0), dtype)
    line_t = values_t * by_channel(s) + values * by_channel(s_t) + by_channel(shift_t)
    out_t = built.affine_relu_along(found.values, found_t, (s, shift), (s_t, shift_t))
    close(out_t, line_t * (out > 0), dtype)

    grad, grad_t = (channels_last(draw(*out.shape).to(dtype)) for _ in range(2))
    g, sums = built.relu_sums(grad, found, (s, shift))
    assert torch.equal(g, grad * (out > 0))
    d = values - by_channel(mean)
    g_t, sums_t = built.relu_sums_along(grad_t, g, found, found_t, (s, shift))
    assert torch.equal(g_t, grad_t * (out > 0))
    for one, terms in (
        (sums[0], g.double()),
        (sums[1], g.double() * d),
        (sums_t[0], g_t.double()),
        (sums_t[1], g_t.double() * d),
        (sums_t[2], g.double() * values_t),
    ):
        most = float(terms.abs().sum((0, 2, 3)).max()) or 1.0
        assert float((one - terms.sum((0, 2, 3))).abs().max()) <= ERRORS[dtype] * most

    wanted = by_channel(shift) + by_channel(slope) * x + spread(by_channel(s) * g.double())
    x_grad = built.norm_pool_grad(images, g, found, constant=shift, bend=-slope, scale=s)
    close(x_grad, wanted, dtype)
    wanted = by_channel(shift_t) + by_channel(slope) * x + by_channel(shift) * x_t
    wanted = wanted + spread(by_channel(s) * g_t.double() + by_channel(s_t) * g.double())
    x_grad_t = built.norm_pool_grad_along(
        (images, images_t),
        (g, g_t),
        found,
        constant_t=shift_t,
        bends=(-shift, -slope),
        scales=(s, s_t),
    )
    close(x_grad_t, wanted, dtype)


@given(SHAPES, st.sampled_from([1, 3]))
@many
def test_first_layer(built: Kernels, shape: tuple[int, ...], c: int) -> None:
    B, C, H, W, seed = shape
    torch.manual_seed(seed)
    dtype, taps = built.dtype, 9 * c
    x, w, w_t, scale = draw(B, c, H, W), draw(C, c, 3, 3), draw(C, c, 3, 3), draw(C)
    padded = built.padded(x)
    patches = F.unfold(x, 3, padding=1).view(B, c, 9, -1).permute(0, 3, 2, 1).reshape(-1, taps)
    patches = torch.cat([patches, torch.ones(len(patches), 1).double()], 1)
    close(built.patch_gram(padded), patches.T @ patches, dtype)

    def by_tap(weight: Tensor) -> Tensor:
        return weight.permute(2, 3, 1, 0).reshape(taps, C).to(dtype).contiguous()

    values, places = built.first_maxima(padded, by_tap(w), scale.to(dtype))
    if H < 2 or W < 2:
        assert values.numel() == 0
        return
    sign = scale.sign()[:, None, None]
    wanted = F.max_pool2d(F.conv2d(x, w, padding=1) * sign, 2) * sign
    close(values, wanted, dtype)
    # the places as found: where two values are equal but for rounding, either is right
    h, half = values.shape[2:]
    rows = torch.arange(h)[:, None] * 2 + places.long() // 2
    positions = (rows * W + torch.arange(half) * 2 + places.long() % 2).flatten(2)
    full_t = F.conv2d(x, w_t, padding=1).flatten(2).gather(2, positions).view_as(values)
    close(built.first_maxima_along(padded, by_tap(w_t), places), full_t, dtype)
    g = channels_last(draw(*values.shape).to(dtype))
    dense = torch.zeros(B, C, H * W).double().scatter_(2, positions, g.double().flatten(2))
    wanted = torch.nn.grad.conv2d_weight(x, w.shape, dense.view(B, C, H, W), padding=1)
    close(built.first_filter_sums(padded, g, places), by_tap(wanted).double(), dtype, 10)
