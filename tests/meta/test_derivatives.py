"""Models that lack a derivative, or give no logits, are refused in words that name the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_meta import METHODS, WAYS, Graph, changed, episodes, flat, learner, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymaml.common.errors import UserError
from raymaml.models.heads import Classifier
from raymaml.types import EpisodeBatch


def attend(out: Tensor) -> Tensor:
    tokens = out[:, None]
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0]


class Recurrent(Graph):
    def hang(self) -> None:
        self.rnn = nn.LSTM(1, 3, batch_first=True)

    def encode(self, x: Tensor) -> Any:
        return self.rnn(super().encode(x)[..., None])[0][:, -1]


class WritesATable(Graph):
    def hang(self) -> None:
        self.table = torch.zeros(3)

    def encode(self, x: Tensor) -> Any:
        out = super().encode(x)
        self.table.add_(out.detach().mean(0))
        return out + self.table


Attention, PlainAttention = changed(attend), changed(sdpa_kernel(SDPBackend.MATH)(attend))
Groups = changed(lambda out: F.group_norm(out, 1))
Distances = changed(lambda model, out: torch.cdist(out, model.b.weight), with_model=True)
Branches = changed(lambda out: out if out.sum() > 0 else 2 * out)
Items = changed(lambda out: out * out.abs().max().item())


def batch() -> EpisodeBatch:
    return episodes(2, size=4, dtype=torch.float32)


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed"])
def test_attention_without_a_second_derivative_names_the_way_out(gradient: str) -> None:
    with pytest.raises(
        UserError, match=r"no second derivative \(.*attention.*first_order, .*SDPBackend\.MATH"
    ):
        learner(Attention, gradient).meta_gradient(batch())
    learner(Attention, "first_order").meta_gradient(batch())
    learner(Attention).predict(batch())
    learner(PlainAttention, gradient).meta_gradient(batch())


@pytest.mark.parametrize("model", [Attention, Groups, Recurrent, Distances])
def test_mixed_mode_without_a_forward_derivative_names_the_way_out(model: type[Graph]) -> None:
    says = r"inner\.gradient: mixed_mode needs forward .* set inner\.gradient: checkpointed"
    with pytest.raises(UserError, match=says):
        learner(model, "mixed_mode").meta_gradient(batch())


@pytest.mark.parametrize("model", [Recurrent, Branches, Items, WritesATable])
def test_what_cannot_take_several_episodes_at_once_names_the_way_out(model: type[Graph]) -> None:
    with pytest.raises(UserError, match=r"set cluster\.episodes_per_chunk: 1"):
        learner(model).chunk_gradients(batch())
    grads = [flat(learner(model, g).episode_gradient(batch()[0]).grads) for g in METHODS[:2]]
    assert relative_error(*grads) < 1e-4  # float32


def test_a_mistake_of_one_episode_is_not_blamed_on_several() -> None:
    misfit = changed(lambda out: out.detach().sum(0).add_(out))
    with pytest.raises(RuntimeError, match="broadcast shape") as caught:
        learner(misfit).episode_gradient(batch()[0])
    assert not isinstance(caught.value, UserError)


class Gives(nn.Module):
    """16 features; in training something else."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.give = nn.Linear(16, 16), give

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.a(x.flatten(1)))
        return self.give(features) if self.training else features


FEATURES: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda features: (features, features), "a tuple"),
    (lambda features: features[:, :, None, None], r"a tensor of shape \[6, 16, 1, 1\]"),
    (lambda features: features[:1], r"a tensor of shape \[1, 16\]"),
    (lambda features: features.long(), r"features of type torch\.int64"),
    (lambda features: features.half(), r"features of type torch\.float16"),
    (lambda features: None, "a NoneType"),
]


@pytest.mark.parametrize(("give", "found"), FEATURES)
def test_an_encoder_that_gives_no_features_in_training_is_refused(
    give: Callable[[Tensor], Any], found: str
) -> None:
    says = rf"Gives turns 6 images into {found} in training .* shape \[6, 16\] and type"
    for gradient in ("unrolled", "mixed_mode"):
        maml = learner(Classifier(Gives(give), 16, WAYS), gradient)
        for call in (maml.meta_gradient, maml.chunk_gradients):
            with pytest.raises(UserError, match=says):
                call(batch())
        maml.predict(batch())


LOGITS: list[Callable[[Tensor], Any]] = [
    lambda out: (out,),
    torch.flatten,
    lambda out: out.argmax(1),
]


@pytest.mark.parametrize("give", LOGITS)
def test_a_model_that_gives_no_logits_is_refused(give: Callable[[Tensor], Any]) -> None:
    forward = lambda self, x: give(Graph.forward(self, x))  # noqa: E731
    maml = learner(type("Bare", (Graph,), {"forward": forward}))
    for call in (maml.meta_gradient, maml.predict):
        with pytest.raises(UserError, match=r"model: turns 6 images into .* must give logits"):
            call(batch())
