"""The chain of blocks in closed form against PyTorch's derivatives of the same network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.kernels.blocks import Images, Numbers
from raymaml.kernels.build import NoKernelsError
from raymaml.kernels.chain import Chain, Weights
from raymaml.kernels.library import kernels

Named = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _kernels_are_there() -> None:
    try:
        kernels(torch.float64)
    except NoKernelsError as error:
        pytest.skip(f"no kernels: {error}")


def drawn(channels: int, width: int, depth: int, size: int) -> Named:
    named: Named = {}
    for block in range(depth):
        inputs = width if block else channels
        named[f"{block}.w"] = torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        named[f"{block}.s"] = torch.randn(width)  # of both signs
        named[f"{block}.b"] = torch.randn(width) * 0.1
    features = width * (size >> depth) ** 2
    named["head"], named["bias"] = torch.randn(5, features) * features**-0.5, torch.randn(5)
    return named


def loss(x: Tensor, y: Tensor, named: Named, depth: int, temperature: float) -> Tensor:
    for block in range(depth):
        x = F.conv2d(x, named[f"{block}.w"], padding=1)
        affine = (named[f"{block}.s"], named[f"{block}.b"])
        x = F.relu(F.max_pool2d(F.batch_norm(x, None, None, *affine, training=True), 2))
    return F.cross_entropy(temperature * F.linear(x.flatten(1), named["head"], named["bias"]), y)


def weights(named: Named, depth: int) -> Weights:
    blocks = [Numbers(*(named[f"{block}.{part}"] for part in "wsb")) for block in range(depth)]
    return Weights(blocks, named["head"], named["bias"])


def by_name(found: Weights, lowest: int) -> Named:
    named = {"head": found.head, "bias": found.bias}
    for block, numbers in enumerate(found.blocks, lowest):
        named |= zip(
            (f"{block}.{part}" for part in "wsb"),
            (numbers.weight, numbers.scale, numbers.shift),
            strict=True,
        )
    return named


def distance(found: Named, wanted: Named) -> float:
    """The largest distance of a tensor from that wanted, relative to its norm."""
    pairs = ((value, wanted[name].detach()) for name, value in found.items())
    return max(float((value - right).norm() / right.norm()) for value, right in pairs)


CASES = [  # channels, width, depth, size, images, lowest block, temperature
    (3, 32, 4, 84, 5, 0, 1.0),
    (1, 16, 4, 28, 5, 0, 1.0),
    (3, 48, 3, 21, 3, 1, 2.0),
    (1, 64, 2, 9, 2, 2, 0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_and_hessian_product_are_those_of_autograd(case: tuple[float, ...]) -> None:
    channels, width, depth, size, count, lowest = map(int, case[:6])
    torch.manual_seed(0)
    x, y = torch.randn(count, channels, size, size).double(), torch.arange(count) % 5
    named = {name: value.double() for name, value in drawn(channels, width, depth, size).items()}
    along = {name: torch.randn_like(value) for name, value in named.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    total = loss(x, y, leaves, depth, case[6])
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    inner = sum((grad * along[name]).sum() for name, grad in zip(leaves, grads, strict=True))
    products = torch.autograd.grad(inner, list(leaves.values()))

    built = kernels(torch.float64)
    images = Images(built, x)

    def chain(named: Named) -> Chain:
        return Chain(built, images, y, weights(named, depth), temperature=case[6])

    here = chain(named)
    found = here.gradient(lowest)
    assert float(here.loss - total.detach()) == pytest.approx(0, abs=1e-12)
    assert len(found.blocks) == depth - lowest
    assert distance(by_name(found, lowest), dict(zip(leaves, grads, strict=True))) < 1e-11
    product = here.product(weights(along, depth), lowest)
    assert distance(by_name(product, lowest), dict(zip(leaves, products, strict=True))) < 1e-10

    def moved(by: float) -> Named:
        at = {name: value + by * along[name] for name, value in named.items()}
        return by_name(chain(at).gradient(lowest), lowest)

    if size == 84:  # of a million values some flip in their window at any step
        return
    step = 1e-7
    differences = {
        name: (up - down) / (2 * step)
        for (name, up), down in zip(moved(step).items(), moved(-step).values(), strict=True)
    }
    assert distance(by_name(product, lowest), differences) < 1e-6


def test_float32_is_as_near_as_its_rounding() -> None:
    """On an episode without ties: each result is within 1e-5 of float64."""
    torch.manual_seed(1)
    x, y = torch.randn(5, 3, 28, 28), torch.arange(5)
    named, along = drawn(3, 32, 2, 28), drawn(3, 32, 2, 28)
    found: list[list[Named]] = []
    for dtype in (torch.float32, torch.float64):
        images = Images(kernels(dtype), x.to(dtype))
        at, direction = (
            weights({name: value.to(dtype) for name, value in each.items()}, 2)
            for each in (named, along)
        )
        chain = Chain(kernels(dtype), images, y, at)
        found.append([by_name(chain.gradient(), 0), by_name(chain.product(direction), 0)])
    for single, double in zip(*found, strict=True):
        assert distance(single, double) < 1e-5
