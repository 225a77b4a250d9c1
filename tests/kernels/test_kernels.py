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


EPS = 1e-3


def by_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def averaged(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mean over as many pixels as images of ``shape`` have."""
    B, _, H, W, _ = shape
    return v.sum((0, 2, 3)) / (B * H * W)


def near(found: Tensor, terms: Tensor, factor: Tensor, dtype: torch.dtype) -> None:
    """``found`` is ``factor`` times the sum of terms over images and pixels."""
    wanted, most = factor * terms.sum((0, 2, 3)), (factor * terms.abs().sum((0, 2, 3))).abs().max()
    assert float((found - wanted).abs().max()) <= ERRORS[dtype] * (float(most) or 1.0)


def convolved(
    built: Kernels, images: Tensor, scale: Tensor, rows: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Convolved images, with a large mean, and their maxima, which are the same without them."""
    C = images.shape[1]
    weight = draw(C, C, 3, 3) / (9 * C) ** 0.5
    filters = built.filters(weight.to(built.dtype))
    images += 3
    y, maxima = built.convolve_and_pool(images, filters, scale, rows)
    assert y is not None
    assert torch.equal(y, built.convolve(images, filters))
    again = torch.empty_like(rows)
    alone, same = built.convolve_and_pool(images, filters, scale, again, keep=False)
    assert alone is None
    assert all(torch.equal(*pair) for pair in zip(maxima, same, strict=True))
    assert torch.equal(rows[:2], again[:2])
    return y, maxima


@given(SHAPES)
@many
def test_norm_and_pool(built: Kernels, shape: tuple[int, ...]) -> None:
    """The formulas of blocks.py, with their names."""
    B, C, H, W, seed = shape
    torch.manual_seed(seed)
    dtype, n = built.dtype, B * H * W
    images, images_t = (channels_last(draw(B, C, H, W).to(dtype)) for _ in range(2))
    x_t = images_t.double()
    scale, scale_t, shift, shift_t = numbers = [draw(C) for _ in range(4)]
    real = [each.to(dtype) for each in numbers]
    rows, rows_t = built.rows(C), built.rows(C)
    images, (maxima, places) = convolved(built, images, real[0], rows)
    x = images.double()
    close(rows[0], x.mean((0, 2, 3)), dtype)
    close(rows[1], x.var((0, 2, 3), correction=0), dtype)
    if H < 2 or W < 2:
        assert maxima.numel() == 0
        return
    sign = by_channel(scale.sign())
    wanted, indices = F.max_pool2d_with_indices(x * sign, 2)
    assert torch.equal(maxima.double(), wanted * sign)
    assert torch.equal(places.long(), places_of(indices, W))

    def spread(g: Tensor) -> Tensor:
        full = torch.zeros(B, C, H * W).double().scatter_(2, indices.flatten(2), g.flatten(2))
        return full.view(B, C, H, W)

    mean, r = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + EPS) ** -0.5
    s, d, d_of_maxima = scale * r, x - by_channel(mean), maxima.double() - by_channel(mean)
    out = built.norm_relu(maxima, real[0], real[2], EPS, rows)
    wanted = by_channel(s) * d_of_maxima + by_channel(shift)
    close(out, wanted.clamp(min=0), dtype, 10)
    is_positive = out > 0

    maxima_t = built.maxima_along((images, images_t), places, (rows, rows_t))
    values_t = x_t.flatten(2).gather(2, indices.flatten(2)).view_as(out)
    assert torch.equal(maxima_t.double(), values_t)
    x_mean, x_product = averaged(x_t, shape), averaged(x_t * d, shape)
    r_t = -(r**3) * x_product
    s_t = scale_t * r + scale * r_t
    out_t = built.norm_relu_along((maxima, maxima_t), (real[0], real[1]), real[3], (rows, rows_t))
    line_t = by_channel(s) * (values_t - by_channel(x_mean)) + by_channel(s_t) * d_of_maxima
    close(out_t, (line_t + by_channel(shift_t)) * is_positive, dtype, 100)

    grad, grad_t = (channels_last(draw(*out.shape).to(dtype)) for _ in range(2))
    g, g_t = grad.clone(), grad_t.clone()
    grads = built.norm_relu_back(g, maxima, n, rows, given=False)
    assert torch.equal(g, grad * is_positive)
    assert not grads[0].any()
    near(grads[1], g.double() * d_of_maxima, r, dtype)
    near(grads[2], g.double(), torch.ones(C).double(), dtype)
    grads_t = built.norm_relu_back_along(g_t, g, (maxima, maxima_t), n, (rows, rows_t))
    assert torch.equal(g_t, grad_t * is_positive)
    near(grads_t[2], g_t.double(), torch.ones(C).double(), dtype)

    g, g_t = g.double(), g_t.double()
    g_mean, g_mean_t = averaged(g, shape), averaged(g_t, shape)
    product = averaged(g * d_of_maxima, shape)
    product_t = averaged(g_t * d_of_maxima + g * values_t, shape) - g_mean * x_mean
    close(grads_t[1], n * (product_t * r + product * r_t), dtype, 1000)
    bend = s * r**2 * product
    bend_t = r**2 * (s_t * product + s * product_t) + 2 * s * r * r_t * product
    x_grad = built.norm_pool_grad(images, g.to(dtype), places, rows)
    wanted = by_channel(s) * (spread(g) - by_channel(g_mean)) - by_channel(bend) * d
    close(x_grad, wanted, dtype, 10)
    again = built.norm_pool_grad(images.clone(), g.to(dtype), places, rows, keep=False)
    assert torch.equal(again, x_grad)
    x_grad_t = built.norm_pool_grad_along(
        (images, images_t.clone()), (g.to(dtype), g_t.to(dtype)), places, (rows, rows_t)
    )
    wanted = by_channel(s) * (spread(g_t) - by_channel(g_mean_t)) - by_channel(bend_t) * d
    wanted = wanted + by_channel(s_t) * (spread(g) - by_channel(g_mean))
    close(x_grad_t, wanted - by_channel(bend) * (x_t - by_channel(x_mean)), dtype, 1000)


@given(SHAPES, st.sampled_from([1, 3]))
@many
def test_first_layer(built: Kernels, shape: tuple[int, ...], c: int) -> None:
    """Values and sums; ``test_chain`` has the gradients."""
    B, C, H, W, seed = shape
    torch.manual_seed(seed)
    dtype, taps = built.dtype, 9 * c
    x, w, w_t, scale = draw(B, c, H, W), draw(C, c, 3, 3), draw(C, c, 3, 3), draw(C)
    real, real_t, padded = w.to(dtype), w_t.to(dtype), built.padded(x)
    rows, rows_t = built.rows(C), built.rows(C)
    in_patches = F.unfold(x, 3, padding=1).view(B, c, 9, -1).permute(2, 1, 0, 3).reshape(taps, -1)
    patches, cov = built.patches(padded), torch.cov(in_patches, correction=0).view(taps, taps)
    close(patches[:-1], cov, dtype)
    close(patches[-1], in_patches.mean(1), dtype)

    def by_tap(weight: Tensor) -> Tensor:
        return weight.permute(2, 3, 1, 0).reshape(taps, C)

    convolved, convolved_t = (F.conv2d(x, each, padding=1) for each in (w, w_t))
    d = convolved - convolved.mean((0, 2, 3), keepdim=True)
    spread = built.first_moments(real, patches, rows)
    close(spread, cov @ by_tap(w), dtype)
    close(rows[0], convolved.mean((0, 2, 3)), dtype)
    close(rows[1], averaged(d * d, shape), dtype)
    close(built.first_moments_along(real_t, patches, spread, rows_t), cov @ by_tap(w_t), dtype)
    close(rows_t[0], averaged(convolved_t, shape), dtype)
    close(rows_t[1], averaged(convolved_t * d, shape), dtype, 10)

    maxima, places = built.first_maxima(padded, real, scale.to(dtype))
    if H < 2 or W < 2:
        assert maxima.numel() == 0
        return
    sign = by_channel(scale.sign())
    close(maxima, F.max_pool2d(convolved * sign, 2) * sign, dtype)
    if H % 2 == W % 2 == 0:
        found = built.first_maxima_and_moments(padded, real, scale.to(dtype), rows_t)
        assert all(torch.equal(*pair) for pair in zip(found, (maxima, places), strict=True))
        close(rows_t[0], convolved.mean((0, 2, 3)), dtype)
        close(rows_t[1], averaged(d * d, shape), dtype)
    # the places as found: where two values are equal but for rounding, either is right
    h, half = maxima.shape[2:]
    pixels = torch.arange(h)[:, None] * 2 + places.long() // 2
    positions = (pixels * W + torch.arange(half) * 2 + places.long() % 2).flatten(2)
    full_t = convolved_t.flatten(2).gather(2, positions).view_as(maxima)
    close(built.first_maxima_along(padded, real_t, places), full_t, dtype)

    built.norm_relu(maxima, scale.to(dtype), scale.to(dtype), EPS, rows)
    grad = channels_last(draw(*maxima.shape).to(dtype))
    arguments = (padded, grad, (maxima, places), (patches, spread), rows)
    before = grad.clone()
    nothing, *alone = built.first_back(*arguments, keep=False)
    assert nothing is None
    assert torch.equal(grad, before)
    sums, *grads = built.first_back(*arguments, keep=True)
    assert sums is not None
    line = by_channel(rows[3]) * maxima + by_channel(rows[4])
    close(grad, before.double() * (line > 0), dtype)
    dense = torch.zeros(B, C, H * W).double().scatter_(2, positions, grad.double().flatten(2))
    wanted = torch.nn.grad.conv2d_weight(x, w.shape, dense.view(B, C, H, W), padding=1)
    close(sums, by_tap(wanted), dtype, 10)
    assert all(torch.equal(*pair) for pair in zip(alone, grads, strict=True))
