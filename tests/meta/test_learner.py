"""Contract 1: the meta-gradient is exact. And what an episode may and may not touch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_meta import QUERIES, SIZE, WAYS, episodes, flat, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig, ModelConfig
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.models.heads import Classifier
from raymaml.models.policies import apply_policies
from raymaml.training.state import load_params
from raymaml.types import Episode, Params


class Mlp(nn.Module):
    """Images of 4x4 -> logits by way of 3 smooth hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 3)
        self.head = nn.Linear(3, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.hidden(x.flatten(1))))
        return scores


def convnet(ways: int = WAYS, width: int = 2) -> nn.Module:
    model = build_model(
        ModelConfig(width=width), image_shape=(1, SIZE, SIZE), num_ways=ways, seed=1
    ).double()
    with torch.no_grad():
        model.head.weight.mul_(50)  # at its start the head is so small that all gradients are
    return model


def mlp() -> nn.Module:
    model = Mlp().double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def learner(model: nn.Module, **inner: Any) -> MetaLearner:
    return MetaLearner(model, InnerConfig(**{"num_steps": 3, "lr": 0.3, **inner}))


def adapted(model: nn.Module, params: Params, episode: Episode, inner: InnerConfig) -> Params:
    """Algorithm 1, lines 5 and 6, written down once more."""
    for _ in range(inner.num_steps):
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = F.cross_entropy(
            functional_call(model, params, (episode.support_x,)), episode.support_y
        )
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: value
            - (inner.head_lr if "head" in name and inner.head_lr is not None else inner.lr) * grad
            for (name, value), grad in zip(params.items(), grads, strict=True)
        }
    return {name: value.detach() for name, value in params.items()}


def query_loss(model: nn.Module, params: Params, episode: Episode) -> Tensor:
    return F.cross_entropy(functional_call(model, params, (episode.query_x,)), episode.query_y)


def theta(model: nn.Module) -> Params:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def adapted_loss(model: nn.Module, params: Params, episode: Episode, inner: InnerConfig) -> float:
    return query_loss(model, adapted(model, params, episode, inner), episode).item()


@pytest.mark.parametrize("head_lr", [None, 0.05, 0.0])
def test_unrolled_equals_central_differences_in_every_entry(head_lr: float | None) -> None:
    model, episode = mlp(), episodes(size=4)[0]
    maml = learner(model, head_lr=head_lr)
    found = maml.episode_gradient(episode).grads
    step, wanted = 1e-5, {}
    for name, value in theta(model).items():
        slopes = torch.empty_like(value)
        for place in range(value.numel()):
            shifted = []
            for sign in (1, -1):
                params = theta(model)
                params[name].view(-1)[place] += sign * step
                shifted.append(adapted_loss(model, params, episode, maml.inner))
            slopes.view(-1)[place] = (shifted[0] - shifted[1]) / (2 * step)
        wanted[name] = slopes
    # error of the differences: step^2 = 1e-10 of the third derivative, 1e-16 / step = 1e-11
    assert relative_error(flat(found), flat(wanted)) < 1e-7


@pytest.mark.parametrize("num_steps", [1, 3])
def test_unrolled_equals_central_differences_through_convnet4(num_steps: int) -> None:
    model, episode = convnet(), episodes()[0]
    maml = learner(model, num_steps=num_steps)
    found = flat(maml.episode_gradient(episode).grads)
    generator = torch.Generator().manual_seed(0)
    step = 1e-6  # small, so that no maximum of a pooling changes its place
    for _ in range(4):
        direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            pieces = direction.split([value.numel() for value in theta(model).values()])
            params = {
                name: value + sign * step * piece.view_as(value)
                for (name, value), piece in zip(theta(model).items(), pieces, strict=True)
            }
            ends.append(adapted_loss(model, params, episode, maml.inner))
        slope = (ends[0] - ends[1]) / (2 * step)
        wanted = (found @ direction).item()
        # rounding: 1e-16 / 1e-6 = 1e-10, amplified by the norms of four blocks
        assert abs(slope - wanted) < 1e-6 * (found.norm() * direction.norm()).item()


@pytest.mark.parametrize("make", [mlp, convnet])
def test_first_order_is_the_query_gradient_at_the_adapted_weights(make: Any) -> None:
    model = make()
    episode = episodes(size=4 if make is mlp else SIZE)[0]
    maml = learner(model, gradient="first_order")
    fast = adapted(model, theta(model), episode, maml.inner)
    leaves = {name: value.requires_grad_() for name, value in fast.items()}
    wanted = torch.autograd.grad(query_loss(model, leaves, episode), list(leaves.values()))
    found = flat(maml.episode_gradient(episode).grads)
    exact = flat(learner(model).episode_gradient(episode).grads)
    assert relative_error(found, torch.cat([grad.flatten() for grad in wanted])) < 1e-12
    assert relative_error(found, exact) > 1e-2  # it is another gradient than the exact one


@pytest.mark.parametrize("gradient", ["unrolled", "mixed_mode", "first_order"])
def test_without_inner_steps_theta_itself_is_judged(gradient: str) -> None:
    model, batch = convnet(), episodes()
    maml = learner(model, num_steps=0, gradient=gradient)
    plain = model(batch[0].query_x)
    loss = F.cross_entropy(plain, batch[0].query_y)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    result = maml.episode_gradient(batch[0])
    assert relative_error(flat(result.grads), wanted) < 1e-12
    assert torch.equal(result.loss, loss.detach())
    torch.testing.assert_close(maml.predict(batch)[0], plain.detach())
    assert maml.logits_by_step(batch[0]).shape == (1, WAYS * QUERIES, WAYS)


def test_a_batch_is_the_mean_of_its_episodes() -> None:
    batch, maml = episodes(3), learner(convnet())
    loss, logits, grads = maml.meta_gradient(batch)
    single = [maml.episode_gradient(episode) for episode in batch]
    torch.testing.assert_close(loss, sum(s.loss for s in single) / 3)
    torch.testing.assert_close(flat(grads), sum(flat(s.grads) for s in single) / 3)
    assert logits.shape == (3, WAYS * QUERIES, WAYS)
    assert all(torch.equal(logits[i], s.logits) for i, s in enumerate(single))


def test_training_and_evaluation_adapt_by_one_path() -> None:
    batch, maml = episodes(2), learner(convnet())
    _, logits, _ = maml.meta_gradient(batch)
    torch.testing.assert_close(maml.predict(batch), logits, rtol=0, atol=1e-10)
    by_step = [maml.logits_by_step(episode) for episode in batch]
    assert all(steps.shape == (4, WAYS * QUERIES, WAYS) for steps in by_step)
    assert torch.equal(torch.stack([steps[-1] for steps in by_step]), maml.predict(batch))


def test_logits_by_step_are_those_of_shorter_inner_loops() -> None:
    model, episode = convnet(), episodes()[0]
    by_step = learner(model, num_steps=3).logits_by_step(episode)
    for steps in range(4):
        fast = adapted(model, theta(model), episode, InnerConfig(num_steps=steps, lr=0.3))
        wanted = functional_call(model, fast, (episode.query_x,))
        torch.testing.assert_close(by_step[steps], wanted, rtol=0, atol=1e-10)


def test_evaluation_may_have_an_inner_loop_of_its_own() -> None:
    model, batch = convnet(), episodes()
    both = MetaLearner(
        model,
        InnerConfig(num_steps=1, lr=0.3),
        test_inner=InnerConfig(num_steps=2, lr=0.1),
    )
    short, long = learner(model, num_steps=1), learner(model, num_steps=2, lr=0.1)
    assert torch.equal(both.predict(batch), long.predict(batch))
    assert torch.equal(flat(both.meta_gradient(batch)[2]), flat(short.meta_gradient(batch)[2]))


def one_step(**inner: Any) -> tuple[Params, Params]:
    model, episode = convnet(), episodes()[0]
    *_, fast = learner(model, num_steps=1, **inner).adapt(episode)
    moved = {name: (fast.params[name] - value).detach() for name, value in theta(model).items()}
    head = {name: value for name, value in moved.items() if name.startswith("head.")}
    return head, {name: value for name, value in moved.items() if name not in head}


def test_the_head_has_a_rate_of_its_own() -> None:
    head, encoder = one_step(lr=0.3)
    faster, same = one_step(lr=0.3, head_lr=0.6)
    still, also = one_step(lr=0.3, head_lr=0.0)
    frozen, none = one_step(lr=0.0, head_lr=0.3)
    assert flat(head).norm() > 0
    assert flat(encoder).norm() > 0
    torch.testing.assert_close(flat(faster), 2 * flat(head))
    torch.testing.assert_close(flat(frozen), flat(head))
    assert not flat(still).any()
    assert not flat(none).any()
    assert torch.equal(flat(same), flat(encoder))
    assert torch.equal(flat(also), flat(encoder))


def test_a_zero_head_starts_at_zero_and_is_no_meta_parameter() -> None:
    model, episode = convnet(), episodes()[0]
    maml = MetaLearner(model, InnerConfig(num_steps=2, lr=0.3), head="zero")
    assert not any(name.startswith("head.") for name in maml.params)
    assert len(maml.params) == len(list(model.parameters())) - 2
    by_step = maml.logits_by_step(episode)
    assert not by_step[0].any()
    assert by_step[1].any()
    before = theta(model)
    zeros = {n: torch.zeros_like(v) if "head" in n else v for n, v in before.items()}
    wanted = adapted_loss(model, zeros, episode, maml.inner)
    result = maml.episode_gradient(episode)
    assert result.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert set(result.grads) == set(before)


def test_a_zero_head_leaves_the_encoder_unmoved_in_the_first_step() -> None:
    # its gradient passes through the head, which is zero then
    model, episode = convnet(), episodes()[0]
    maml = MetaLearner(model, InnerConfig(num_steps=2, lr=0.3), head="zero")
    start, first, second = maml.adapt(episode)
    encoder = "encoder.conv1.conv.weight"
    assert torch.equal(start.params[encoder], first.params[encoder])
    assert not torch.equal(first.params[encoder], second.params[encoder])


def test_an_encoder_learned_on_three_ways_judges_five_with_a_zero_head() -> None:
    inner = InnerConfig(num_steps=2, lr=0.3)
    three, five = (MetaLearner(convnet(ways), inner, head="zero") for ways in (3, 5))
    with torch.no_grad():
        three.model.encoder.conv1.conv.weight.add_(1)
    load_params(five, three.params)
    assert torch.equal(
        five.params["encoder.conv1.conv.weight"], three.params["encoder.conv1.conv.weight"]
    )
    assert five.predict(episodes(ways=5)).shape == (1, 5 * QUERIES, 5)


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode", "first_order"])
def test_an_episode_changes_nothing_and_leaves_nothing(gradient: str) -> None:
    model, batch = convnet(), episodes(2)
    before, maml = theta(model), learner(model, gradient=gradient)
    alone = maml.episode_gradient(batch[1])
    predicted = maml.predict(batch)
    maml.episode_gradient(batch[0])
    list(maml.adapt(batch[0]))
    after = maml.episode_gradient(batch[1])
    assert torch.equal(flat(alone.grads), flat(after.grads))
    assert torch.equal(predicted, maml.predict(batch))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not alone.loss.requires_grad
    assert not alone.logits.requires_grad


def test_adaptation_works_where_gradients_are_off() -> None:
    maml, batch = learner(convnet()), episodes()
    wanted = maml.predict(batch)
    with torch.no_grad():
        assert torch.equal(maml.predict(batch), wanted)


def test_the_order_of_the_queries_does_not_matter() -> None:
    maml, episode = learner(convnet()), episodes()[0]
    order = torch.randperm(WAYS * QUERIES, generator=torch.Generator().manual_seed(0))
    turned = replace(episode, query_x=episode.query_x[order], query_y=episode.query_y[order])
    torch.testing.assert_close(
        maml.logits_by_step(turned), maml.logits_by_step(episode)[:, order], rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        flat(maml.episode_gradient(turned).grads), flat(maml.episode_gradient(episode).grads)
    )


def test_transductive_predictions_depend_on_the_other_queries() -> None:
    maml, episode = learner(convnet()), episodes()[0]
    together = maml.logits_by_step(episode)[-1]
    half = replace(episode, query_x=episode.query_x[:4], query_y=episode.query_y[:4])
    assert (maml.logits_by_step(half)[-1] - together[:4]).abs().max() > 1e-2


def test_the_support_set_alone_decides_the_fast_weights() -> None:
    maml, (one, other) = learner(convnet()), episodes(2)
    mixed = replace(one, query_x=other.query_x)
    *_, fast = maml.adapt(one)
    *_, again = maml.adapt(mixed)
    assert all(torch.equal(fast.params[name], again.params[name]) for name in fast.params)


def test_a_model_that_does_not_fit_is_refused() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model = Classifier(encoder, 4 * 6 * 6, 3)
    with pytest.raises(UserError, match=r"encoder\.1 keep moments from episode to episode"):
        MetaLearner(model, InnerConfig())
    apply_policies(model, {"*": "context"}, eps=1e-5, momentum=0.1)
    assert MetaLearner(model, InnerConfig()).head == "learned"
    with pytest.raises(UserError, match=r"head: is shared, and head.weight has 3 row"):
        MetaLearner(model, InnerConfig(), head="shared")


@pytest.mark.parametrize("head", ["learned", "zero", "shared"])
def test_a_built_model_knows_where_its_head_starts(head: Any) -> None:
    config = ModelConfig(width=4, head=head)
    model = build_model(config, image_shape=(3, 16, 16), num_ways=3, seed=0)
    assert MetaLearner(model, InnerConfig()).head == head


def test_what_requires_no_gradient_is_neither_adapted_nor_learned() -> None:
    model = build_model(ModelConfig(width=4), image_shape=(3, 16, 16), num_ways=3, seed=0)
    model.encoder.conv1.conv.requires_grad_(False)
    maml = MetaLearner(model, InnerConfig())
    still = {"encoder.conv1.conv.weight", "encoder.conv1.conv.bias"}
    assert still.isdisjoint(maml.params)
    assert "encoder.conv1.conv                        112  frozen" in maml.adaptation_table()
