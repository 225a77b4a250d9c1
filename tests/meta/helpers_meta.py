"""Small learners and random episodes, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raymaml.config.inner import InnerConfig
from raymaml.config.model import ModelConfig
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.types import EpisodeBatch, Params

WAYS, SHOTS, QUERIES, SIZE = 3, 2, 3, 16
METHODS = ["unrolled", "checkpointed", "mixed_mode", "first_order"]


class Graph(nn.Module):
    """4x4 images -> 3 smooth features -> logits; subclasses change the way to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 3), nn.Linear(3, 3), nn.Linear(3, WAYS)
        self.hang()

    def hang(self) -> None:
        """Add modules and state."""

    def encode(self, x: Tensor) -> Any:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encode(x.flatten(1)))


def changed(change: Callable[..., Any], *, with_model: bool = False) -> type[Graph]:
    """A model whose features ``change`` changes; it gets them, and before them the model."""

    def encode(self: Graph, x: Tensor) -> Any:
        out = Graph.encode(self, x)
        return change(self, out) if with_model else change(out)

    return type("Changed", (Graph,), {"encode": encode})


def learner(
    model: nn.Module | type[Graph], gradient: str = "unrolled", **inner: Any
) -> MetaLearner:
    """A learner with two large inner steps, over a model or over one with weights of a seed."""
    torch.manual_seed(1)
    model = model if isinstance(model, nn.Module) else model()
    return MetaLearner(
        model, InnerConfig(**{"num_steps": 2, "lr": 0.3, "gradient": gradient, **inner})
    )


def episodes(
    count: int = 1,
    size: int = SIZE,
    ways: int = WAYS,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> EpisodeBatch:
    """Random images."""
    generator = torch.Generator().manual_seed(seed)

    def images(per_class: int) -> Tensor:
        shape = (count, ways * per_class, 1, size, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def labels(per_class: int) -> Tensor:
        return torch.arange(ways).repeat_interleave(per_class).expand(count, -1)

    return EpisodeBatch(
        support_x=images(SHOTS),
        support_y=labels(SHOTS),
        query_x=images(QUERIES),
        query_y=labels(QUERIES),
    )


def build(
    encoder: str = "convnet4",
    norm: str | dict[str, Any] = "transductive",
    head: str = "learned",
    ways: int = WAYS,
    *,
    learn_temperature: bool = True,
    **inner: Any,
) -> MetaLearner:
    """A learner whose head and mixtures are away from where they start.

    Its width is 2, for which there are no kernels; ``kernels`` is ConvNet4 of width 16.
    """
    encoder, width = ("convnet4", 16) if encoder == "kernels" else (encoder, 2)
    own = {"encoder": encoder, "width": width, "norm": norm, "head": head}
    config = ModelConfig(**own, learn_temperature=learn_temperature)
    steps = inner.get("num_steps", 2)
    shape = (1, SIZE, SIZE)
    model = build_model(config, image_shape=shape, num_ways=ways, seed=1, num_steps=steps).double()
    with torch.no_grad():
        model.head.weight.mul_(50)  # at its start the head is so small that all gradients are
        for name, value in model.named_parameters():
            if name.endswith("alpha_offset"):
                value.fill_(0.3)
            elif name.endswith("norm.weight") and value.dim() == 2:  # a row an inner step
                value.copy_(torch.linspace(0.6, 1.4, value.numel()).view_as(value))
            elif name.endswith("norm.bias"):  # a norm of one pixel gives its bias: not the kink, 0
                value.copy_(torch.linspace(-0.4, 0.5, value.numel()).view_as(value))
    return MetaLearner(model, InnerConfig(**{"num_steps": 2, "lr": 0.1, **inner}))


def flat(grads: Params) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()
