"""Contract 1: the meta-gradient is exact. And how a learner treats steps, heads and batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_meta import QUERIES, SIZE, WAYS, Graph, build, episodes, flat, relative_error
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


def mlp() -> nn.Module:
    torch.manual_seed(2)
    return Graph().double()


def convnet() -> nn.Module:
    return build().model.requires_grad_()


def learner(model: nn.Module, **inner: Any) -> MetaLearner:
    return MetaLearner(model, InnerConfig(**{"num_steps": 3, "lr": 0.3, **inner}))


def adapted(model: nn.Module, params: Params, episode: Episode, inner: InnerConfig) -> Params:
    """Algorithm 1, lines 5 and 6, written down once more."""
    for _ in range(inner.num_steps):
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        logits = functional_call(model, params, (episode.support_x,))
        grads = torch.autograd.grad(
            F.cross_entropy(logits, episode.support_y), list(params.values())
        )
        rates = {
            name: inner.head_lr if "head" in name and inner.head_lr is not None else inner.lr
            for name in params
        } | {"temperature": 0.0}
        params = {
            name: value - rates[name] * grad
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


@pytest.mark.parametrize("make", [mlp, convnet])
def test_first_order_is_the_query_gradient_at_the_adapted_weights(make: Any) -> None:
    model, episode = make(), episodes(size=4 if make is mlp else SIZE)[0]
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


def test_auto_is_checkpointed_in_a_loop_of_ones_own() -> None:
    found, wanted = (
        learner(mlp(), gradient=gradient).episode_gradient(episodes(size=4)[0]).grads
        for gradient in ("auto", "checkpointed")
    )
    assert torch.equal(flat(found), flat(wanted))


def test_a_batch_is_the_mean_of_its_episodes() -> None:
    batch, maml = episodes(3), learner(convnet())
    loss, logits, grads = maml.meta_gradient(batch)
    single = [maml.episode_gradient(episode) for episode in batch]
    torch.testing.assert_close(loss, sum(s.loss for s in single) / 3)
    torch.testing.assert_close(flat(grads), sum(flat(s.grads) for s in single) / 3)
    assert torch.equal(logits, torch.stack([s.logits for s in single]))  # [E, N*Q, N]


def test_training_and_evaluation_adapt_by_one_path() -> None:
    batch, maml = episodes(2), learner(convnet())
    _, logits, _ = maml.meta_gradient(batch)
    torch.testing.assert_close(maml.predict(batch), logits, rtol=0, atol=1e-10)
    by_step = torch.stack([maml.logits_by_step(episode) for episode in batch])
    assert by_step.shape == (2, 4, WAYS * QUERIES, WAYS)
    assert torch.equal(by_step[:, -1], maml.predict(batch))


def test_logits_by_step_are_those_of_shorter_inner_loops() -> None:
    model, episode = convnet(), episodes()[0]
    by_step = learner(model, num_steps=3).logits_by_step(episode)
    for steps in range(4):
        fast = adapted(model, theta(model), episode, InnerConfig(num_steps=steps, lr=0.3))
        wanted = functional_call(model, fast, (episode.query_x,))
        torch.testing.assert_close(by_step[steps], wanted, rtol=0, atol=1e-10)


def test_evaluation_may_have_an_inner_loop_of_its_own() -> None:
    model, batch = convnet(), episodes()
    short, long = learner(model, num_steps=1), learner(model, num_steps=2, lr=0.1)
    both = MetaLearner(model, short.inner, test_inner=long.inner)
    assert torch.equal(both.predict(batch), long.predict(batch))
    assert torch.equal(flat(both.meta_gradient(batch)[2]), flat(short.meta_gradient(batch)[2]))


def test_the_head_has_a_rate_of_its_own() -> None:
    def one_step(**inner: Any) -> tuple[Tensor, Tensor]:
        """The moves of head and encoder."""
        model = convnet()
        *_, fast = learner(model, num_steps=1, **inner).adapt(episodes()[0])
        moved = {name: fast.params[name].detach() - value for name, value in theta(model).items()}
        head = {name: value for name, value in moved.items() if name.startswith("head.")}
        return flat(head), flat({name: v for name, v in moved.items() if name not in head})

    head, encoder = one_step(lr=0.3)
    assert head.norm() > 0
    assert encoder.norm() > 0
    for rates, faster, moves in [
        ({"lr": 0.3, "head_lr": 0.6}, 2, True),
        ({"lr": 0.3, "head_lr": 0.0}, 0, True),
        ({"lr": 0.0, "head_lr": 0.3}, 1, False),
    ]:
        found, rest = one_step(**rates)
        torch.testing.assert_close(found, faster * head)
        assert torch.equal(rest, encoder * moves)


def test_a_zero_head_starts_at_zero_and_is_no_meta_parameter() -> None:
    model, episode = convnet(), episodes()[0]
    maml = MetaLearner(model, InnerConfig(num_steps=2, lr=0.3), head="zero")
    assert not any(name.startswith("head.") for name in maml.params)
    assert len(maml.params) == len(list(model.parameters())) - 2
    by_step = maml.logits_by_step(episode)
    assert not by_step[0].any()
    assert by_step[1].any()
    zeros = {n: torch.zeros_like(v) if "head" in n else v for n, v in theta(model).items()}
    wanted = adapted_loss(model, zeros, episode, maml.inner)
    result = maml.episode_gradient(episode)
    assert result.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert set(result.grads) == set(zeros)
    # the gradient of the encoder passes through the head, which is zero in the first step
    start, first, second = (
        fast.params["encoder.conv1.conv.weight"] for fast in maml.adapt(episode)
    )
    assert torch.equal(start, first)
    assert not torch.equal(first, second)


def test_an_encoder_learned_on_three_ways_judges_five_with_a_zero_head() -> None:
    three, five = (build(head="zero", ways=ways) for ways in (3, 5))
    name = "encoder.conv1.conv.weight"
    with torch.no_grad():
        three.params[name].add_(1)
    load_params(five, three.params)
    assert torch.equal(five.params[name], three.params[name])
    assert five.predict(episodes(ways=5)).shape == (1, 5 * QUERIES, 5)


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
        maml.episode_gradient(turned).grads, maml.episode_gradient(episode).grads
    )


def test_transductive_predictions_depend_on_the_other_queries() -> None:
    maml, episode = learner(convnet()), episodes()[0]
    together = maml.logits_by_step(episode)[-1]
    half = replace(episode, query_x=episode.query_x[:4], query_y=episode.query_y[:4])
    assert (maml.logits_by_step(half)[-1] - together[:4]).abs().max() > 1e-2


def test_the_support_set_alone_decides_the_fast_weights() -> None:
    maml, (one, other) = learner(convnet()), episodes(2)
    *_, fast = maml.adapt(one)
    *_, again = maml.adapt(replace(one, query_x=other.query_x))
    assert torch.equal(flat(fast.params), flat(again.params))


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
