"""The passes of ConvNet4 and its head in closed form, by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules import module as of_torch

from raymaml.kernels.batched import BatchedImages
from raymaml.kernels.blocks import Images, Norm, Numbers
from raymaml.kernels.chain import Chain, Weights
from raymaml.kernels.library import WIDTHS, kernels_like
from raymaml.layers import Pass, row_of_step
from raymaml.models import norm as norms
from raymaml.models.closed_rules.duals import Conv2d
from raymaml.models.encoders import ConvBlock, ConvNet4
from raymaml.passes.closed import ClosedForm
from raymaml.types import Params

_ALL = {"support", "context", "query"}
CLOSED_PASSES: Mapping[type[nn.Module], Set[str]] = {
    norms.TransductiveNorm2d: _ALL,
    norms.RunningNorm2d: _ALL,
    norms.EpisodicNorm2d: _ALL,
    norms.BiasedEpisodicNorm2d: _ALL,
    norms.ContextNorm2d: {"support"},
    norms.ReferenceTaskNorm2d: {"support"},
}
"""The passes by policy whose norm goes by the batch, or by constants."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


class ConvNet4Pass:
    """A pass through the blocks and the head; see ``passes.closed.ClosedPass``.

    Args:
        params: the parameters.
        images: of the set.
        layers: the norms of the blocks, as the pass has set them.
        step: the inner step, of a support pass; of another, the one before it.
        temperature: factor of the logits.
        order: highest derivative that follows: 0, 1, or 2 for ``product``.
    """

    def __init__(
        self,
        params: Params,
        images: Images | BatchedImages,
        layers: list[norms.ScaledNorm2d],
        *,
        step: int,
        temperature: Tensor,
        order: int,
    ) -> None:
        self._params, self._labels = params, torch.empty(0)
        self._rows = [
            row_of_step(layer.bias, step) if layer.bias.dim() > 1 else None for layer in layers
        ]
        self._temperature = temperature
        self._lowest = 0
        call = partial(_called, several=isinstance(images, BatchedImages))
        chosen = [Norm(layer.eps, call(layer, layer.given)) for layer in layers]
        weights = self._weights(params, missing_scale=1.0)
        self._chain = Chain(images, weights, chosen, order=order)
        self.logits = self._chain.logits
        for layer, block in zip(layers, self._chain.blocks, strict=True):
            if layer.accumulates and block.norm.given is None:
                moments = (each.to(block.numbers.scale.dtype) for each in block.moments)
                call(layer, partial(layer.absorb, count=block.count), *moments)
            if isinstance(layer, norms.ReferenceTaskNorm2d):
                call(layer, layer.see, self._chain.features)

    @property
    def nbytes(self) -> int:
        """See ``ClosedPass``."""
        return self._chain.nbytes

    def gradient(self, labels: Tensor, names: Iterable[str]) -> Params:
        """See ``ClosedPass``."""
        wanted, self._labels = set(names), labels
        blocks = range(len(self._rows))
        moving = [n for n in blocks if any(each.startswith(f"{block_name(n)}.") for each in wanted)]
        self._lowest = moving[0] if moving else len(self._rows)
        found = self._named(self._chain.gradient(labels, self._lowest))
        return {name: value for name, value in found.items() if name in wanted}

    def product(self, direction: Params) -> Params:
        """See ``ClosedPass``."""
        if self._lowest:  # the gradients below are not those of parameters that adapt
            self._chain.gradient(self._labels)
            self._lowest = 0
        return self._named(self._chain.product(self._weights(direction, missing_scale=0.0)))

    def _weights(self, values: Params, missing_scale: float) -> Weights:
        """Return the tensors by name as weights; zeros are in the place of those that lack."""

        def value(name: str) -> Tensor:
            found = values.get(name)
            return torch.zeros_like(self._params[name]) if found is None else found

        def of_step(name: str, row: int | None) -> Tensor:
            return value(name) if row is None else value(name)[..., row, :]

        blocks = []
        for number, row in enumerate(self._rows):
            name = block_name(number)
            shift = of_step(f"{name}.norm.bias", row)
            scale = torch.full_like(shift, missing_scale)
            if f"{name}.norm.weight" in self._params:
                scale = of_step(f"{name}.norm.weight", row)
            conv = value(f"{name}.conv.weight"), value(f"{name}.conv.bias")
            blocks.append(Numbers(*(each.contiguous() for each in (*conv, scale, shift))))
        return Weights(blocks, value("head.weight"), value("head.bias"), self._temperature)

    def _named(self, found: Weights) -> Params:
        """Return a gradient by the names of the parameters."""
        named = {
            "head.weight": found.head,
            "head.bias": found.bias,
            "temperature": found.temperature,
        }
        lowest = len(self._rows) - len(found.blocks)
        for number, numbers in enumerate(found.blocks, lowest):
            name, row = block_name(number), self._rows[number]
            named |= {f"{name}.conv.weight": numbers.weight, f"{name}.conv.bias": numbers.bias}
            for part, value in (("weight", numbers.scale), ("bias", numbers.shift)):
                whole = self._params.get(f"{name}.norm.{part}")
                named[f"{name}.norm.{part}"] = value
                if row is not None and whole is not None:
                    named[f"{name}.norm.{part}"] = torch.zeros_like(whole)
                    named[f"{name}.norm.{part}"][..., row, :] = value
        return {name: value for name, value in named.items() if name in self._params}


def _called(layer: nn.Module, method: Callable[..., Any], *values: Tensor, several: bool) -> Any:
    """Call a method of a norm; of several episodes, for each with its own moments: [E, ...]."""
    own: dict[str, Any] = layer._buffers
    if not (several and own):
        return method(*values)

    def of_one(moments: dict[str, Any], *values: Tensor) -> tuple[Any, dict[str, Any]]:
        own.update(moments)
        return method(*values) or (), dict(own)

    found, after = vmap(of_one)(dict(own), *values)
    own.update(after)
    return found or None


def block_name(number: int) -> str:
    """Return the name of a block in the model."""
    return f"encoder.conv{number + 1}"


def closed_form(model: Any, current: Pass, params: Params, x: Tensor) -> ClosedForm | None:
    """Return the passes of a ``Classifier`` in closed form; see ``passes.closed.InClosedForm``.

    Of one episode they go by the kernels, of several by batched matrix products. None: encoder and
    head are not exactly raymaml's own; the norms go neither by the batch nor by constants; or the
    kernels are not for these tensors, or are not there.
    """
    encoder = model.encoder
    if type(encoder) is not ConvNet4 or encoder.strided:
        return None
    blocks = [encoder.conv1, encoder.conv2, encoder.conv3, encoder.conv4]
    if not (_are_alike(x, params) and _are_closed(blocks, current) and _fits(model, x)):
        return None
    layers: list[Any] = [block.norm for block in blocks]
    expected = {"head.weight", "head.bias"} | {
        f"{block_name(number)}.{part}"
        for number, layer in enumerate(layers)
        for part in ("conv.weight", "conv.bias", "norm.bias", "norm.weight")
        if part != "norm.weight" or layer.weight is not None
    }
    if not expected <= params.keys() or (images := _images(x, layers)) is None:
        return None

    def form(params: Params, step: int, order: int) -> ConvNet4Pass:
        factor = params.get("temperature", model.temperature)
        if not isinstance(factor, Tensor):
            factor = x.new_full((), factor)
        factor = factor.to(x.dtype)
        return ConvNet4Pass(params, images, layers, step=step, temperature=factor, order=order)

    return form


def _images(x: Tensor, layers: list[Any]) -> Images | BatchedImages | None:
    """Return images for a chain; None: there is none for them."""
    if x.dim() == 5:
        return BatchedImages(x)
    if any(layer.bias.shape[-1] % WIDTHS for layer in layers):
        return None
    kernels = kernels_like(x)
    return None if kernels is None else Images(kernels, x)


def _are_closed(blocks: list[Any], current: Pass) -> bool:
    """Return whether the blocks are raymaml's own, with norms that have a closed form here."""
    return all(
        type(block) is ConvBlock
        and type(block.conv) is Conv2d
        and block.conv.bias is not None
        and all(getattr(block.conv, name) == value for name, value in _PLAIN.items())
        and current in CLOSED_PASSES.get(type(block.norm), ())
        and _do_no_more([block, block.conv, block.norm])
        for block in blocks
    )


def _fits(model: Any, x: Tensor) -> bool:
    """Return whether the head is raymaml's own, and fits the features of the images."""
    encoder, head = model.encoder, model.head
    length = encoder.conv4.conv.out_channels * (x.shape[-2] // 16) * (x.shape[-1] // 16)
    return (
        type(head) is nn.Linear
        and head.bias is not None
        and head.in_features == length > 0
        and x.shape[-3] == encoder.conv1.conv.in_channels
        and _do_no_more([model, encoder, head])
    )


def _are_alike(x: Tensor, params: Params) -> bool:
    """Return whether these are images for the first block, and plain tensors of one type."""
    return (
        x.dim() in (4, 5)
        and x.shape[-3] in (1, 3)
        and x.shape[-4] > 0
        and all(
            type(each) in (Tensor, nn.Parameter)
            and each.dtype == x.dtype
            and each.device == x.device
            for each in (x, *params.values())
        )
    )


def _do_no_more(modules: list[nn.Module]) -> bool:
    """Return whether the modules do nothing but what their classes do."""
    of_all = (of_torch._global_forward_hooks, of_torch._global_forward_pre_hooks)
    return not any(of_all) and not any(
        "forward" in vars(each) or any(vars(each).get(name) for name in _HOOKS) for each in modules
    )
