"""How a learner treats steps, rates, heads, batches and frozen parameters (float64)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_meta import QUERIES, WAYS, Graph, build, episodes, flat, learner, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.common.errors import UserError
from raymaml.common.patterns import matches
from raymaml.config.inner import InnerConfig
from raymaml.meta.learner import MetaLearner
from raymaml.training.state import load_params
from raymaml.types import Episode, Params


def convnet() -> nn.Module:
    return build().model.requires_grad_()


def adapted(model: nn.Module, params: Params, episode: Episode, inner: InnerConfig) -> Params:
    """Algorithm 1, lines 5 and 6, written down once more."""
    for _ in range(inner.num_steps):
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        logits = functional_call(model, params, (episode.support_x,))
        grads = torch.autograd.grad(
            F.cross_entropy(logits, episode.support_y), list(params.values())
        )
        params = {
            name: value if name == "temperature" else value - inner.lr * grad
            for (name, value), grad in zip(params.items(), grads, strict=True)
        }
    return {name: value.detach() for name, value in params.items()}


def query_loss(model: nn.Module, params: Params, episode: Episode) -> Tensor:
    return F.cross_entropy(functional_call(model, params, (episode.query_x,)), episode.query_y)


def theta(model: nn.Module) -> Params:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_first_order_is_the_query_gradient_at_the_adapted_weights() -> None:
    model, episode = convnet(), episodes()[0]
    maml = learner(model, "first_order")
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
    maml = learner(model, gradient, num_steps=0)
    plain = model(batch[0].query_x)
    loss = F.cross_entropy(plain, batch[0].query_y)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    result = maml.episode_gradient(batch[0])
    assert relative_error(flat(result.grads), wanted) < 1e-12
    assert torch.equal(result.loss, loss.detach())
    torch.testing.assert_close(maml.predict(batch)[0], plain.detach())
    assert maml.logits_by_step(batch[0]).shape == (1, WAYS * QUERIES, WAYS)


def test_auto_is_checkpointed_in_a_loop_of_ones_own() -> None:
    batch = episodes(size=4, dtype=torch.float32)
    ways = [learner(Graph, way).meta_gradient(batch) for way in ("auto", "checkpointed")]
    assert torch.equal(*(flat(grads) for _, _, grads in ways))


def test_a_batch_is_the_mean_of_its_episodes() -> None:
    batch, maml = episodes(3), learner(convnet())
    loss, logits, grads = maml.meta_gradient(batch)
    single = [maml.episode_gradient(episode) for episode in batch]
    torch.testing.assert_close(loss, sum(s.loss for s in single) / 3)
    torch.testing.assert_close(flat(grads), sum(flat(s.grads) for s in single) / 3)
    assert torch.equal(logits, torch.stack([s.logits for s in single]))  # [E, N*Q, N]


def test_episodes_at_once_give_what_one_at_a_time_gives() -> None:
    """Three episodes, two of them together. Running moments, which the support images alone move
    here, move as far; a query loss reads those of the episodes before, so it may differ."""
    batch, grads, moments = episodes(3), [], []
    for at_once in (1, 2):
        maml, running = build(rates="per_tensor"), build(norm="running")
        loss = maml.backward(batch, at_once=at_once)
        grads.append(torch.cat((flat({n: v.grad for n, v in maml.params.items()}), loss[None])))
        before = flat(running.moments).clone()
        running.backward(batch, at_once=at_once)
        moments.append(flat(running.moments))
        assert relative_error(before, moments[-1]) > 1e-3
    assert relative_error(*grads) < 1e-10
    assert relative_error(*moments) < 1e-10


def test_training_and_evaluation_adapt_by_one_path() -> None:
    model, batch = convnet(), episodes(2)
    maml = learner(model, num_steps=3)
    _, logits, _ = maml.meta_gradient(batch)
    torch.testing.assert_close(maml.predict(batch), logits, rtol=0, atol=1e-10)
    by_step = torch.stack([maml.logits_by_step(episode) for episode in batch])  # [E, T+1, N*Q, N]
    assert torch.equal(by_step[:, -1], maml.predict(batch))
    for steps in range(4):
        fast = adapted(model, theta(model), batch[0], InnerConfig(num_steps=steps, lr=0.3))
        wanted = functional_call(model, fast, (batch[0].query_x,))
        torch.testing.assert_close(by_step[0, steps], wanted, rtol=0, atol=1e-10)


def test_evaluation_may_have_an_inner_loop_of_its_own() -> None:
    model, batch = convnet(), episodes()
    short, long = learner(model, num_steps=1), learner(model, lr=0.1, frozen=("encoder",))
    both = MetaLearner(model, short.inner, test_inner=long.inner)
    assert torch.equal(both.predict(batch), long.predict(batch))
    assert torch.equal(flat(both.meta_gradient(batch)[2]), flat(short.meta_gradient(batch)[2]))
    start, *_, fast = both.adapt(batch[0])
    moved = {n for n in start.params if not torch.equal(start.params[n], fast.params[n])}
    assert moved == {"head.weight", "head.bias"}


def test_the_head_has_a_rate_of_its_own() -> None:
    def moves(**inner: Any) -> tuple[Tensor, Tensor]:
        """Those of head and encoder in one step."""
        start, fast = learner(convnet(), num_steps=1, **inner).adapt(episodes()[0])
        moved = {name: fast.params[name] - value for name, value in start.params.items()}
        head = {name: moved.pop(name) for name in ("head.weight", "head.bias")}
        return flat(head), flat(moved)

    head, encoder = moves(lr=0.3)
    assert head.norm() * encoder.norm() > 0
    for lr, head_lr in ((0.3, 0.6), (0.3, 0.0), (0.0, 0.3)):
        found, rest = moves(lr=lr, head_lr=head_lr)
        torch.testing.assert_close(found, head * head_lr / 0.3)
        torch.testing.assert_close(rest, encoder * lr / 0.3)


def test_a_zero_head_starts_at_zero_and_is_no_meta_parameter() -> None:
    model, episode = convnet(), episodes()[0]
    maml = MetaLearner(model, InnerConfig(num_steps=2, lr=0.3), head_start="zero")
    assert len(maml.params) == len(list(model.parameters())) - 2
    assert not any(name.startswith("head.") for name in maml.params)
    zeros = {n: torch.zeros_like(v) if "head" in n else v for n, v in theta(model).items()}
    wanted = query_loss(model, adapted(model, zeros, episode, maml.inner), episode).item()
    result = maml.episode_gradient(episode)
    assert result.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert set(result.grads) == set(zeros)
    # the gradient of the encoder passes through the head, which is zero in the first step
    first = [fast.params["encoder.conv1.conv.weight"] for fast in maml.adapt(episode)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize("head", ["zero", "shared"])
def test_an_encoder_learned_on_three_ways_judges_five(head: str) -> None:
    three, five = (build(head=head, ways=ways) for ways in (3, 5))
    name = "encoder.conv1.conv.weight"
    with torch.no_grad():
        three.params[name].add_(1)
    load_params(five, three.params)
    assert torch.equal(five.params[name], three.params[name])
    for maml in (three, five):
        assert maml.predict(episodes(ways=5)).shape == (1, 5 * QUERIES, 5)


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


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("encoder.conv1", "encoder.conv1.norm.bias", True),
        ("encoder.conv1", "encoder.conv10.weight", False),
        ("conv1", "encoder.conv1.conv.weight", False),
        ("*.norm", "encoder.layer1.conv2.norm.weight", True),
        ("*.norm", "encoder.norms.weight", False),
        ("head.bias", "head.weight", False),
        ("encoder.layer[12]", "encoder.layer2.conv1.conv.weight", True),
        ("encoder.layer[12]", "encoder.layer3.conv1.conv.weight", False),
        ("*", "anything", True),
    ],
)
def test_patterns_are_anchored_and_match_all_inside(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


def test_a_frozen_parameter_stays_but_gets_a_meta_gradient() -> None:
    maml, episode = build(norm="context", frozen=("*.norm",)), episodes()[0]
    start, *_, fast = maml.adapt(episode)
    for name in maml.params:
        moved = not torch.equal(start.params[name], fast.params[name])
        assert moved is (".norm." not in name and name != "temperature")
    assert all(grad.any() for grad in maml.episode_gradient(episode).grads.values())


def test_all_patterns_without_a_match_are_named() -> None:
    with pytest.raises(UserError) as caught:
        build(frozen=("bn", "head", "encoder.conv5"))
    assert [problem.partition(" matches")[0] for problem in caught.value.problems] == [
        "inner.frozen: 'bn'",
        "inner.frozen: 'encoder.conv5'",
    ]
    assert "it has encoder.conv1.conv, encoder.conv1.norm" in str(caught.value)


def test_nothing_to_adapt_is_like_no_inner_step() -> None:
    batch, none = episodes(2), build(norm="layer", num_steps=0)
    for gradient in ("unrolled", "checkpointed", "first_order"):
        still = build(norm="layer", frozen=("*",), gradient=gradient)
        torch.testing.assert_close(still.meta_gradient(batch)[2], none.meta_gradient(batch)[2])
        assert torch.equal(still.predict(batch), none.predict(batch))


def test_the_table_says_what_adapts_with_how_many_parameters() -> None:
    one = build(norm="context", frozen=("*.norm",))
    one.model.encoder.conv2.conv.requires_grad_(False)  # neither adapts nor learns
    maml = MetaLearner(one.model, one.inner)
    assert {"encoder.conv2.conv.weight", "encoder.conv2.conv.bias"}.isdisjoint(maml.params)
    rows = [line.split() for line in maml.adaptation_table().splitlines()]
    assert ["encoder.conv1.conv", "20", "adapts"] in rows  # 2 x 1 x 3 x 3 + 2
    assert ["encoder.conv2.conv", "38", "frozen"] in rows
    assert ["encoder.conv1.norm", "4", "frozen"] in rows
    assert ["temperature", "1", "frozen"] in rows
    # 20 + 3 x 38 convolutions, 16 of norms, head 3 x 2 + 3, temperature
    assert rows[-1] == ["in", "all", "160", "105", "adapt"]
