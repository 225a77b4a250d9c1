"""Models that lack a derivative, or give no logits, are refused in words that name the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_meta import WAYS, episodes, flat, relative_error
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

    def mix(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class Attention(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class PlainAttention(Attention):
    def mix(self, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().mix(tokens)


class Groups(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.group(tokens)
        return out


class Recurrent(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.rnn(tokens)[0]
        return out


class Distances(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        return torch.cdist(tokens, self.a.weight)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class OwnFunction(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        out: Tensor = _Square.apply(tokens)
        return out


class Branches(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.sum() > 0 else 2 * tokens


class Items(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        return tokens * tokens.abs().max().item()


class WritesATable(Encoder):
    def mix(self, tokens: Tensor) -> Tensor:
        self.table.add_(tokens.detach().mean(0))
        return tokens + self.table


def batch() -> EpisodeBatch:
    found = episodes(2, size=4)
    return EpisodeBatch(
        support_x=found.support_x.float(),
        support_y=found.support_y,
        query_x=found.query_x.float(),
        query_y=found.query_y,
    )


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


@pytest.mark.parametrize("encoder", [Attention, Groups, Recurrent, Distances, OwnFunction])
def test_mixed_mode_without_a_forward_derivative_names_the_way_out(encoder: type[Encoder]) -> None:
    says = r"inner\.gradient: mixed_mode needs forward .* set inner\.gradient: checkpointed"
    with pytest.raises(UserError, match=says):
        learner(encoder(), "mixed_mode").meta_gradient(batch())


@pytest.mark.parametrize("encoder", [Recurrent, OwnFunction, Branches, Items, WritesATable])
def test_what_cannot_take_several_episodes_at_once_names_the_way_out(
    encoder: type[Encoder],
) -> None:
    with pytest.raises(UserError, match=r"set cluster\.episodes_per_chunk: 1"):
        learner(encoder()).chunk_gradients(batch())
    torch.manual_seed(1)
    one = encoder()
    grads = [flat(learner(one, g).episode_gradient(batch()[0]).grads) for g in METHODS]
    assert relative_error(*grads) < 1e-4  # float32


METHODS = ["unrolled", "checkpointed"]


class Gives(Encoder):
    """In training something else than features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.a(x[:, 0])).flatten(1)
        if not self.training:
            return features
        others = {
            "tuple": (features, features),
            "dict": {"features": features},
            "4-D": features[:, :, None, None],
            "narrow": features[:, :3],
            "one": features[:1],
            "flat": features.flatten(),
            "whole numbers": features.long(),
            "half": features.half(),
            "nothing": None,
        }
        return others[self.kind]


GIVES = {
    "tuple": "a tuple",
    "dict": "a dict",
    "4-D": r"a tensor of shape \[6, 16, 1, 1\]",
    "narrow": r"a tensor of shape \[6, 3\]",
    "one": r"a tensor of shape \[1, 16\]",
    "flat": r"a tensor of shape \[96\]",
    "whole numbers": r"features of type torch\.int64",
    "half": r"features of type torch\.float16",
    "nothing": "a NoneType",
}


@pytest.mark.parametrize("kind", GIVES)
def test_an_encoder_that_gives_no_features_in_training_is_refused(kind: str) -> None:
    wanted = r"it must give a tensor of shape \[6, 16\] and type torch\.float32"
    for gradient in ("unrolled", "mixed_mode"):
        maml = learner(Gives(kind), gradient)
        with pytest.raises(
            UserError, match=rf"Gives turns 6 images into {GIVES[kind]} in training"
        ):
            maml.meta_gradient(batch())
        with pytest.raises(UserError, match=wanted):
            maml.chunk_gradients(batch())
        maml.predict(batch())


class Bare(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(16, WAYS)

    def forward(self, x: Tensor) -> Any:
        logits = self.head(x.flatten(1))
        kinds = {"tuple": (logits,), "flat": logits.flatten(), "argmax": logits.argmax(1)}
        return kinds[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "flat", "argmax"])
def test_a_model_that_gives_no_logits_is_refused(kind: str) -> None:
    maml = MetaLearner(Bare(kind), InnerConfig(num_steps=1))
    for call in (maml.meta_gradient, maml.predict):
        with pytest.raises(UserError, match=r"model: turns 6 images into .* must give logits"):
            call(batch())
