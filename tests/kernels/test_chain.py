"""The chain of blocks in closed form against PyTorch's derivatives of the same network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.kernels import batched
from raymaml.kernels.batched import BatchedImages
from raymaml.kernels.blocks import Images, Moments, Norm, Numbers
from raymaml.kernels.build import NoKernelsError
from raymaml.kernels.chain import Chain, Weights
from raymaml.kernels.library import kernels

Named = dict[str, Tensor]


class OfOne:
    """The pass of one episode, by the kernels."""

    def __init__(
        self, x: Tensor, named: Named, depth: int, norms: list[Norm] | None = None, order: int = 2
    ) -> None:
        norms = norms or [Norm()] * depth
        images = Images(kernels(x.dtype), x)
        self.chain = Chain(images, weights(named, depth), norms, order=order)
        self.logits, self.depth = self.chain.logits, depth

    def gradient(self, y: Tensor, lowest: int = 0) -> Named:
        return by_name(self.chain.gradient(y, lowest), lowest)

    def product(self, along: Named) -> Named:
        return by_name(self.chain.product(weights(along, self.depth)), 0)


class AmongOthers:
    """The pass of the second of three episodes, by batched matrix products."""

    def __init__(
        self, x: Tensor, named: Named, depth: int, norms: list[Norm] | None = None, order: int = 2
    ) -> None:
        images, norms = BatchedImages(torch.stack([x + 1, x, 2 * x])), norms or [Norm()] * depth
        norms = [replace(norm, given=_among_others(norm.given)) for norm in norms]
        at = weights({n: torch.stack([v + 0.1, v, 2 * v]) for n, v in named.items()}, depth)
        self.chain = Chain(images, at, norms, order=order)
        self.logits, self.depth = self.chain.logits[1], depth

    def gradient(self, y: Tensor, lowest: int = 0) -> Named:
        labels = torch.stack([1 - y.clamp(max=1), y, y.clamp(max=1)])
        found = by_name(self.chain.gradient(labels, lowest), lowest)
        return {name: value[1] for name, value in found.items()}

    def product(self, along: Named) -> Named:
        direction = {n: torch.stack([2 * v, v, v - 1]) for n, v in along.items()}
        found = by_name(self.chain.product(weights(direction, self.depth)), 0)
        return {name: value[1] for name, value in found.items()}


def _among_others(moments: Moments | None) -> Moments | None:
    if moments is None:
        return None
    mean, var = moments
    return torch.stack([mean + 1, mean, -mean]), torch.stack([2 * var, var, var + 1])


PassOf = type[OfOne] | type[AmongOthers]


@pytest.fixture(params=[OfOne, AmongOthers], ids=["one episode", "several"])
def pass_of(request: pytest.FixtureRequest) -> PassOf:
    if request.param is OfOne:
        _require_kernels()
    return request.param


def _require_kernels() -> None:
    try:
        kernels(torch.float64)
    except NoKernelsError as error:
        pytest.skip(f"no kernels: {error}")


def drawn(channels: int, width: int, depth: int, size: int) -> Named:
    named: Named = {}
    for block in range(depth):
        inputs = width if block else channels
        named[f"{block}.w"] = torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        named[f"{block}.c"] = torch.randn(width)
        named[f"{block}.s"] = torch.randn(width)  # of both signs
        named[f"{block}.b"] = torch.randn(width) * 0.1
    features = width * (size >> depth) ** 2
    named["head"], named["bias"] = torch.randn(5, features) * features**-0.5, torch.randn(5)
    named["temperature"] = torch.tensor(1.0)
    return named


def loss(
    x: Tensor, y: Tensor, named: Named, depth: int, given: list[Moments] | None = None
) -> Tensor:
    """By the batch, or with given moments."""
    for block in range(depth):
        x = F.conv2d(x, named[f"{block}.w"], named[f"{block}.c"], padding=1)
        affine = (named[f"{block}.s"], named[f"{block}.b"])
        moments = given[block] if given else (None, None)
        x = F.batch_norm(x, *moments, *affine, training=not given)
        x = F.relu(F.max_pool2d(x, 2))
    logits = named["temperature"] * F.linear(x.flatten(1), named["head"], named["bias"])
    return F.cross_entropy(logits, y)


def weights(named: Named, depth: int) -> Weights:
    blocks = [Numbers(*(named[f"{block}.{part}"] for part in "wcsb")) for block in range(depth)]
    return Weights(blocks, named["head"], named["bias"], named["temperature"])


def by_name(found: Weights, lowest: int) -> Named:
    named = {"head": found.head, "bias": found.bias, "temperature": found.temperature}
    for block, numbers in enumerate(found.blocks, lowest):
        parts = (numbers.weight, numbers.bias, numbers.scale, numbers.shift)
        named |= zip((f"{block}.{part}" for part in "wcsb"), parts, strict=True)
    return named


def distance(found: Named, wanted: Named) -> float:
    """The largest distance of a tensor from that wanted, relative to its norm; that of a bias
    before a norm by the batch is zero but for rounding."""
    assert found.keys() == {name for name in wanted if name in found}
    pairs = ((value, wanted[name].detach()) for name, value in found.items())
    return max(float((value - right).norm() / max(right.norm(), 1e-3)) for value, right in pairs)


CASES = [  # channels, width, depth, size, images, lowest block, temperature
    (3, 32, 4, 84, 5, 0, 1.0),
    (1, 16, 4, 28, 5, 0, 1.0),
    (3, 48, 3, 21, 3, 1, 2.0),
    (1, 64, 2, 9, 2, 2, 0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_and_hessian_product_are_those_of_autograd(
    case: tuple[float, ...], pass_of: PassOf
) -> None:
    channels, width, depth, size, count, lowest = map(int, case[:6])
    torch.manual_seed(0)
    x, y = torch.randn(count, channels, size, size).double(), torch.arange(count) % 5
    named = {name: value.double() for name, value in drawn(channels, width, depth, size).items()}
    named["temperature"].fill_(case[6])
    along = {name: torch.randn_like(value) for name, value in named.items()}
    along["temperature"].fill_(0)
    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    total = loss(x, y, leaves, depth)
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    inner = sum((grad * along[name]).sum() for name, grad in zip(leaves, grads, strict=True))
    products = torch.autograd.grad(inner, list(leaves.values()))

    here = pass_of(x, named, depth)
    found = here.gradient(y, lowest)
    value = F.cross_entropy(here.logits, y)
    assert float(value - total.detach()) == pytest.approx(0, abs=1e-12)
    assert len(found) == 4 * (depth - lowest) + 3
    assert distance(found, dict(zip(leaves, grads, strict=True))) < 1e-11
    here.gradient(y)
    product = here.product(along)
    assert distance(product, dict(zip(leaves, products, strict=True))) < 1e-10

    def moved(by: float) -> Named:
        at = {name: value + by * along[name] for name, value in named.items()}
        return pass_of(x, at, depth).gradient(y)

    if size == 84:  # of a million values some flip in their window at any step
        return
    step = 1e-7
    differences = {
        name: (up - down) / (2 * step)
        for (name, up), down in zip(moved(step).items(), moved(-step).values(), strict=True)
    }
    assert distance(product, differences) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_given_moments_the_gradient_is_that_of_autograd(
    case: tuple[float, ...], pass_of: PassOf
) -> None:
    channels, width, depth, size, count, lowest = map(int, case[:6])
    torch.manual_seed(1)
    x, y = torch.randn(count, channels, size, size).double(), torch.arange(count) % 5
    named = {name: value.double() for name, value in drawn(channels, width, depth, size).items()}
    given = [(torch.randn(width).double(), torch.rand(width).double() + 1) for _ in range(depth)]
    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    total = loss(x, y, leaves, depth, given)
    grads = torch.autograd.grad(total, list(leaves.values()))
    norms = [Norm(given=moments) for moments in given]
    found = pass_of(x, named, depth, norms, order=1).gradient(y, lowest)
    wanted = dict(zip(leaves, grads, strict=True))
    assert float(wanted["0.c"].norm()) > 1e-3  # here the biases have gradients
    assert distance(found, wanted) < 1e-11


@pytest.mark.parametrize("broken", ["x", "weight", "infinite"])
@pytest.mark.parametrize("by_batch", [True, False], ids=["by the batch", "given moments"])
def test_what_is_no_number_goes_up_to_the_loss(
    broken: str, by_batch: bool, pass_of: PassOf
) -> None:
    """As in PyTorch: a maximum and a ReLU keep it, and training stops with a message."""
    torch.manual_seed(0)
    x, y, named = torch.randn(5, 3, 28, 28), torch.arange(5), drawn(3, 16, 3, 28)
    values = {"x": x[0, 0, 9], "weight": named["1.w"][3, 4], "infinite": named["1.w"][3, 4]}
    values[broken][1] = torch.inf if broken == "infinite" else torch.nan
    ones = torch.zeros(16), torch.ones(16)
    norms = [Norm(given=None if by_batch else ones)] * 3
    wanted = loss(x, y, named, 3, None if by_batch else [ones] * 3)
    for order in (2, 1, 0):
        assert wanted.isnan()
        assert F.cross_entropy(pass_of(x, named, 3, norms, order).logits, y).isnan()


@pytest.mark.parametrize("size", [28, 21])  # even and odd
def test_values_and_gradients_alone_are_the_same(size: int, pass_of: PassOf) -> None:
    """They take other ways through the first block."""
    torch.manual_seed(0)
    y = torch.arange(5)
    x = (torch.randn(5, 3, size, size) + 10).double()  # a large mean costs no digits
    named = {name: value.double() for name, value in drawn(3, 32, 2, size).items()}
    value, gradient, product = (pass_of(x, named, 2, order=order) for order in (0, 1, 2))
    assert float((value.logits - product.logits).abs().max()) < 1e-10
    assert torch.equal(gradient.logits, product.logits)
    found, wanted = (each.gradient(y) for each in (gradient, product))
    assert distance(found, wanted) < 1e-12


def test_images_are_pooled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.9 pools up to 2^31 elements in a call on a GPU."""
    x, y, named = torch.randn(5, 3, 28, 28), torch.arange(5), drawn(3, 16, 3, 28)
    whole = AmongOthers(x, named, 3)
    monkeypatch.setattr(batched, "MOST_POOLED", 4 * 28 * 28 * 16)  # 4 of 15 images
    parts = AmongOthers(x, named, 3)
    assert torch.equal(parts.logits, whole.logits)
    found, wanted = parts.gradient(y), whole.gradient(y)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("order", [0, 2])
def test_memory_of_several_episodes_is_counted_once(order: int) -> None:
    """Of values alone, nothing large stays but the result."""
    x, named = torch.randn(5, 3, 28, 28), drawn(3, 16, 3, 28)
    here = AmongOthers(x, named, 3, order=order)
    if order:
        here.gradient(torch.arange(5))
    tensors = [each for block in here.chain.blocks for each in block.kept()]
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    assert here.chain.nbytes == sum(sizes.values())
    of_a_result = 4 * 3 * 5 * 28 * 28 * 16  # bytes of the first convolution's, of three episodes
    of_weights = 3 * sum(value.nbytes for value in named.values())
    assert here.chain.nbytes < 2 * of_weights if order == 0 else here.chain.nbytes > of_a_result


def test_float32_is_as_near_as_its_rounding(pass_of: PassOf) -> None:
    """On an episode without ties: each result is within 1e-5 of float64."""
    torch.manual_seed(1)
    x, y = torch.randn(5, 3, 28, 28), torch.arange(5)
    named, along = drawn(3, 32, 2, 28), drawn(3, 32, 2, 28)
    found: list[list[Named]] = []
    for dtype in (torch.float32, torch.float64):
        at, direction = (
            {name: value.to(dtype) for name, value in each.items()} for each in (named, along)
        )
        here = pass_of(x.to(dtype), at, 2)
        found.append([here.gradient(y), here.product(direction)])
    for single, double in zip(*found, strict=True):
        assert distance(single, double) < 1e-5
