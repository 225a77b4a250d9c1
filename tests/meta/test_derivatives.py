"""Models that lack a derivative, or give no logits, are refused in words that name the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_meta import METHODS, WAYS, Graph, episodes, flat, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig
from raymaml.meta.learner import MetaLearner
from raymaml.models.heads import Classifier
from raymaml.types import EpisodeBatch

FEATURES = 16


class Encoder(nn.Module):
    """4x4 images -> 16 features by way of tokens ``[B, 4, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.group, self.rnn = nn.GroupNorm(2, 4), nn.LSTM(4, 4, batch_first=True)
        self.table = torch.zeros(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.mix(torch.tanh(self.a(x[:, 0]))).flatten(1)

    def mix(self, tokens: Tensor) -> Any:
        raise NotImplementedError


class Attention(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class PlainAttention(Attention):
    def mix(self, tokens: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return super().mix(tokens)


class Groups(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return self.group(tokens)


class Recurrent(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return self.rnn(tokens)[0]


class Distances(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return torch.cdist(tokens, self.a.weight)


class Branches(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return tokens if tokens.sum() > 0 else 2 * tokens


class Items(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        return tokens * tokens.abs().max().item()


class WritesATable(Encoder):
    def mix(self, tokens: Tensor) -> Any:
        self.table.add_(tokens.detach().mean(0))
        return tokens + self.table


def batch() -> EpisodeBatch:
    return episodes(2, size=4, dtype=torch.float32)


def learner(encoder: nn.Module, gradient: str = "unrolled") -> MetaLearner:
    torch.manual_seed(0)
    model = Classifier(encoder, FEATURES, WAYS)
    return MetaLearner(model, InnerConfig(num_steps=2, lr=0.1, gradient=gradient))


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed"])
def test_attention_without_a_second_derivative_names_the_way_out(gradient: str) -> None:
    with pytest.raises(
        UserError, match=r"no second derivative \(.*attention.*first_order, .*SDPBackend\.MATH"
    ):
        learner(Attention(), gradient).meta_gradient(batch())
    learner(Attention(), "first_order").meta_gradient(batch())
    learner(Attention()).predict(batch())
    learner(PlainAttention(), gradient).meta_gradient(batch())


@pytest.mark.parametrize("encoder", [Attention, Groups, Recurrent, Distances])
def test_mixed_mode_without_a_forward_derivative_names_the_way_out(encoder: type[Encoder]) -> None:
    says = r"inner\.gradient: mixed_mode needs forward .* set inner\.gradient: checkpointed"
    with pytest.raises(UserError, match=says):
        learner(encoder(), "mixed_mode").meta_gradient(batch())


@pytest.mark.parametrize("encoder", [Recurrent, Branches, Items, WritesATable])
def test_what_cannot_take_several_episodes_at_once_names_the_way_out(
    encoder: type[Encoder],
) -> None:
    with pytest.raises(UserError, match=r"set cluster\.episodes_per_chunk: 1"):
        learner(encoder()).chunk_gradients(batch())
    torch.manual_seed(1)
    one = encoder()
    grads = [flat(learner(one, g).episode_gradient(batch()[0]).grads) for g in METHODS[:2]]
    assert relative_error(*grads) < 1e-4  # float32


class Gives(Encoder):
    """In training something else than features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.a(x[:, 0])).flatten(1)
        return GIVES[self.kind][0](features) if self.training else features


GIVES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda features: (features, features), "a tuple"),
    "4-D": (lambda features: features[:, :, None, None], r"a tensor of shape \[6, 16, 1, 1\]"),
    "one": (lambda features: features[:1], r"a tensor of shape \[1, 16\]"),
    "whole": (lambda features: features.long(), r"features of type torch\.int64"),
    "half": (lambda features: features.half(), r"features of type torch\.float16"),
    "none": (lambda features: None, "a NoneType"),
}


@pytest.mark.parametrize("kind", GIVES)
def test_an_encoder_that_gives_no_features_in_training_is_refused(kind: str) -> None:
    says = rf"Gives turns 6 images into {GIVES[kind][1]} in training .* shape \[6, 16\] and type"
    for gradient in ("unrolled", "mixed_mode"):
        maml = learner(Gives(kind), gradient)
        for call in (maml.meta_gradient, maml.chunk_gradients):
            with pytest.raises(UserError, match=says):
                call(batch())
        maml.predict(batch())


LOGITS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda logits: (logits,),
    "flat": torch.flatten,
    "argmax": lambda logits: logits.argmax(1),
}


class Bare(Graph):
    kind: str

    def forward(self, x: Tensor) -> Any:
        return LOGITS[self.kind](super().forward(x))


@pytest.mark.parametrize("kind", LOGITS)
def test_a_model_that_gives_no_logits_is_refused(kind: str) -> None:
    model = Bare()
    model.kind = kind
    maml = MetaLearner(model, InnerConfig(num_steps=1))
    for call in (maml.meta_gradient, maml.predict):
        with pytest.raises(UserError, match=r"model: turns 6 images into .* must give logits"):
            call(batch())
