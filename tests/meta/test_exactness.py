"""Contracts 1 and 8 over encoders, norms, heads, update rules and freezing (float64).

Then several episodes at once, by vmap, and autocast, beside the same.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any, get_args

import pytest
import torch
from helpers_meta import METHODS, SIZE, WAYS, build, episodes, flat, relative_error
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from raymaml.config.model import ENCODERS
from raymaml.config.norm import NormPolicy
from raymaml.meta.inner_loop import unroll
from raymaml.meta.learner import MetaLearner
from raymaml.models.policies import POLICIES
from raymaml.types import Buffers, Episode

RULES = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.05},
    {"momentum": 0.5, "weight_decay": 0.01, "head_lr": 0.2},
]
FROZEN = [(), ("*.norm",), ("encoder.*1", "head.bias"), ("encoder",)]
HEADS = ["learned", "zero", "shared"]
# every encoder with every norm; heads (3), rules (4) and freezing (4, a turn behind) go round
PRODUCT = [
    (encoder, norm, head, rule, FROZEN[(number + number // 4) % 4])
    for number, (encoder, norm, head, rule) in enumerate(
        (encoder, norm, head, rule)
        for (encoder, norm), head, rule in zip(
            [(e, n) for e in ENCODERS for n in POLICIES], cycle(HEADS), cycle(RULES), strict=False
        )
    )
]

PER_STEP: list[tuple[str, dict[str, Any], str, dict[str, Any], tuple[str, ...]]] = [
    ("convnet4", {"policy": "transductive", "per_step": "affine"}, "zero", {"num_steps": 3}, ()),
    ("convnet4", {"policy": "context", "per_step": "affine", "scale": False}, "shared", {}, ()),
    ("resnet10", {"policy": "running", "per_step": "both"}, "learned", {"num_steps": 3}, ()),
    ("convnet4", {"policy": "running", "per_step": "running"}, "zero", {"momentum": 0.9}, ()),
    (
        "convnet4_strided",
        {"policy": "tasknorm_i", "per_step": "affine"},
        "learned",
        {"num_steps": 3},
        ("*.norm",),
    ),
    (
        "resnet12",
        {
            "*.conv2": {"policy": "episodic", "per_step": "affine"},
            "*.conv3": "layer",
            "*": {"policy": "transductive", "scale": False},
        },
        "learned",
        {"weight_decay": 0.05},
        ("*.conv1.norm.bias",),
    ),
]


@torch.enable_grad()
def evaluated(
    learner: MetaLearner, episode: Episode, moments: Buffers | None
) -> tuple[Tensor, Any]:
    """Adapt without a graph, judge with given accumulated moments or with those of the way."""
    adaptation = learner.adaptation(episode, learner.inner)
    *_, fast = unroll(adaptation, create_graph=False)
    with torch.no_grad():
        buffers = fast.buffers if moments is None else moments
        return adaptation.query(replace(fast, buffers=buffers))[0], fast.buffers


@torch.no_grad()
def slope_along(learner: MetaLearner, episode: Episode, direction: Tensor, step: float) -> float:
    """Central difference of the query loss; accumulated moments are constants of the gradient."""
    _, moments = evaluated(learner, episode, None)
    before, ends = flat(learner.params), []
    for sign in (1, -1):
        vector_to_parameters(before + sign * step * direction, learner.params.values())
        ends.append(evaluated(learner, episode, moments)[0].item())
    vector_to_parameters(before, learner.params.values())
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize(("encoder", "norm", "head", "rule", "frozen"), [*PRODUCT, *PER_STEP])
def test_unrolled_checkpointed_mixed_mode_and_central_differences_agree(
    encoder: str, norm: Any, head: str, rule: dict[str, Any], frozen: tuple[str, ...]
) -> None:
    if norm == "none":
        frozen = tuple(pattern for pattern in frozen if pattern != "*.norm")
    episode = episodes(size=20 if encoder == "convnet4_strided" else SIZE)[0]  # not of one pixel
    learner = build(encoder, norm, head, frozen=frozen, **rule)
    exact = learner.episode_gradient(episode)
    turned = episode.channels_last()
    ways = [("checkpointed", episode), ("mixed_mode", episode), ("mixed_mode", turned)]
    for gradient, images in ways:
        again = build(encoder, norm, head, frozen=frozen, gradient=gradient, **rule)
        result = again.episode_gradient(images)
        assert relative_error(flat(result.grads), flat(exact.grads)) < 1e-10
        torch.testing.assert_close(result.logits, exact.logits, rtol=1e-11, atol=1e-11)
        for name, value in exact.buffers.items():  # no second update of statistics
            torch.testing.assert_close(result.buffers[name], value, rtol=1e-11, atol=1e-11)

    grads = flat({name: exact.grads[name] for name in learner.params})
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(grads.shape, generator=generator, dtype=torch.float64)
    wanted = (grads @ direction).item()
    # small, so that no maximum or sign changes its place; the best of four lengths
    errors = [
        abs(slope_along(learner, episode, direction, step) - wanted)
        for step in (1e-9, 1e-8, 1e-7, 1e-6)
    ]
    assert min(errors) < 1e-6 * (grads.norm() * direction.norm()).item()


def test_all_parts_of_the_product_occur() -> None:
    assert len(PRODUCT) == len(ENCODERS) * len(get_args(NormPolicy))
    for place, parts in ((2, HEADS), (3, RULES), (4, FROZEN)):
        assert all(any(case[place] == part for case in PRODUCT) for part in parts)


@pytest.mark.parametrize("norm", [name for name in POLICIES if name != "transductive"])
@pytest.mark.parametrize("steps", [0, 2])
def test_inductive_means_one_query_at_a_time_as_all_at_once(norm: str, steps: int) -> None:
    learner, episode = build(norm=norm, num_steps=steps), episodes()[0]
    together = learner.logits_by_step(episode)  # [T+1, N*Q, N]
    for place in range(len(episode.query_y)):
        one = slice(place, place + 1)
        alone = learner.logits_by_step(
            replace(episode, query_x=episode.query_x[one], query_y=episode.query_y[one])
        )
        assert (alone[:, 0] - together[:, place]).abs().max() < 1e-12


def test_queries_take_the_row_of_the_step_before_them_and_later_steps_the_last() -> None:
    built, episode = build(norm=PER_STEP[0][1], num_steps=2), episodes()[0]
    model, plain = built.model, build().model
    longer = built.inner.model_copy(update={"num_steps": 4, "frozen": ("*.norm",)})
    found = MetaLearner(model, longer).logits_by_step(episode)
    rows = {name: value.detach() for name, value in model.named_parameters()}
    moving = {n: p for n, p in plain.named_parameters() if ".norm." not in n and n != "temperature"}
    plain.load_state_dict({**rows, **{n: v[0] for n, v in rows.items() if ".norm." in n}})
    wanted = [plain(episode.query_x)]
    for step in range(4):
        row = {n: v[min(step, 1)] for n, v in rows.items() if ".norm." in n}
        plain.load_state_dict(row, strict=False)
        loss = torch.nn.functional.cross_entropy(plain(episode.support_x), episode.support_y)
        grads = torch.autograd.grad(loss, list(moving.values()))
        with torch.no_grad():
            for value, grad in zip(moving.values(), grads, strict=True):
                value.sub_(0.1 * grad)
        wanted.append(plain(episode.query_x))
    torch.testing.assert_close(found, torch.stack(wanted).detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("gradient", METHODS)
def test_an_episode_changes_nothing_and_leaves_nothing(norm: str, gradient: str) -> None:
    batch, learner = episodes(2), build(norm=norm, head="zero", gradient=gradient)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    alone, predicted = learner.episode_gradient(batch[1]), learner.predict(batch)
    learner.episode_gradient(batch[0])
    learner.meta_gradient(batch)
    list(learner.adapt(batch[0]))
    assert torch.equal(flat(alone.grads), flat(learner.episode_gradient(batch[1]).grads))
    assert torch.equal(predicted, learner.predict(batch))
    assert all(torch.equal(v, before[n]) for n, v in learner.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in learner.model.parameters())
    assert not alone.loss.requires_grad
    assert not alone.logits.requires_grad


@pytest.mark.parametrize("per_step", ["none", "running", "both"])
def test_running_moments_go_on_as_if_episodes_came_one_after_the_other(per_step: str) -> None:
    batch, norm = episodes(3), {"policy": "running", "per_step": per_step}
    one, other = (build("resnet10", norm, "zero") for _ in range(2))
    one.meta_gradient(batch, update_moments=True)  # each from the moments of the one before
    other.absorb([other.episode_gradient(episode).buffers for episode in batch])  # all from theta's
    assert len(one.running_moments) == 3 * 12  # stem, 8 convolutions, 3 shortcuts
    for name, value in one.running_moments.items():
        torch.testing.assert_close(value, other.running_moments[name], rtol=1e-12, atol=1e-12)
    mean = one.moments["encoder.stem.norm.mean"]  # [C], or [T, C]
    assert mean.shape == ((2,) if per_step == "none" else (2, 2))
    assert mean.all()


def test_a_shared_head_does_not_know_the_order_of_the_ways() -> None:
    learner, episode = build(norm="context", head="shared"), episodes()[0]
    turned = replace(
        episode, support_y=(episode.support_y + 1) % WAYS, query_y=(episode.query_y + 1) % WAYS
    )
    logits, again = learner.logits_by_step(episode), learner.logits_by_step(turned)
    torch.testing.assert_close(again, logits.roll(1, dims=2), rtol=0, atol=1e-12)
    assert logits[-1].std() > 1e-3
    one, two = learner.episode_gradient(episode), learner.episode_gradient(turned)
    assert relative_error(flat(one.grads), flat(two.grads)) < 1e-10
    assert one.grads["head.weight"].shape == (1, 2)


def test_momentum_and_decay_are_those_of_torch_sgd() -> None:
    inner = {"momentum": 0.9, "weight_decay": 0.1, "num_steps": 4, "lr": 0.05}
    learner, episode = build(norm="layer", **inner), episodes()[0]
    *_, fast = learner.adapt(episode)
    model = build(norm="layer").model
    moving = [p for n, p in model.named_parameters() if n != "temperature"]
    optimizer = torch.optim.SGD(moving, lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(episode.support_x), episode.support_y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast.params[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_the_temperature_scales_the_logits_and_is_learned_but_not_adapted() -> None:
    learner, episode = build(norm="layer"), episodes()[0]
    cold = learner.logits_by_step(episode)[0]
    with torch.no_grad():
        learner.model.temperature.fill_(3)
    torch.testing.assert_close(learner.logits_by_step(episode)[0], 3 * cold)
    *_, fast = learner.adapt(episode)
    assert fast.params["temperature"].item() == 3
    assert learner.episode_gradient(episode).grads["temperature"].item() != 0


CHUNKS = [
    ("convnet4", "transductive", "zero", {"momentum": 0.9}, ("encoder.conv1",)),
    ("convnet4", "context", "shared", {"weight_decay": 0.05}, ("*.norm",)),
    ("resnet12", "transductive", "learned", {"momentum": 0.9, "weight_decay": 0.05}, ()),
    ("resnet10", "layer", "learned", {}, ("head",)),
    *PER_STEP,
    *(("convnet4", norm, "learned", {}, ()) for norm in POLICIES),
]


@pytest.mark.parametrize(("encoder", "norm", "head", "rule", "frozen"), CHUNKS)
def test_a_chunk_is_the_loop(encoder, norm, head, rule, frozen) -> None:
    batch = episodes(3)
    for gradient in METHODS:
        learner = build(encoder, norm, head, frozen=frozen, gradient=gradient, **rule)
        for result, episode in zip(learner.chunk_gradients(batch), batch, strict=True):
            wanted = learner.episode_gradient(episode)
            torch.testing.assert_close(result.loss, wanted.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.logits, wanted.logits, rtol=1e-10, atol=1e-10)
            assert relative_error(flat(result.grads), flat(wanted.grads)) < 1e-10, gradient
            assert result.grads.keys() == wanted.grads.keys()
            for name, value in wanted.buffers.items():
                torch.testing.assert_close(result.buffers[name], value)


def test_in_float32_a_chunk_is_the_loop_to_rounding() -> None:
    batch = episodes(2, dtype=torch.float32)
    for gradient in METHODS:
        learner = build(gradient=gradient)
        learner.model.float()
        for result, episode in zip(learner.chunk_gradients(batch), batch, strict=True):
            wanted = learner.episode_gradient(episode)
            torch.testing.assert_close(result.logits, wanted.logits, rtol=5e-6, atol=5e-6)
            assert relative_error(flat(result.grads), flat(wanted.grads)) < 5e-6, gradient


def test_one_episode_is_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymaml.passes.forward.vmap", None)
    learner, batch = build(), next(episodes(2).chunks(1))
    (found,) = learner.chunk_gradients(batch)
    assert torch.equal(flat(found.grads), flat(learner.episode_gradient(batch[0]).grads))


def test_chunks_cover_a_batch_in_order() -> None:
    chunks = list(episodes(5).chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([chunk.support_x for chunk in chunks]), episodes(5).support_x)


def of_precision(half: torch.dtype | None, gradient: str, norm: str, layout: bool) -> MetaLearner:
    built = build(norm=norm, gradient=gradient)
    model = built.model.float()
    return MetaLearner(model, built.inner, channels_last=layout, half_precision=half)


@pytest.mark.parametrize("gradient", METHODS)
@pytest.mark.parametrize("norm", ["transductive", "context", "running", "tasknorm_i", "layer"])
@pytest.mark.parametrize("layout", [False, True])
def test_only_convolutions_and_products_lose_digits(gradient, norm, layout: bool) -> None:
    batch = episodes(2, dtype=torch.float32)
    exact = of_precision(None, gradient, norm, layout).episode_gradient(batch[0])
    half = of_precision(torch.bfloat16, gradient, norm, layout)
    result = half.episode_gradient(batch[0])
    tensors = [result.loss, result.logits, *result.grads.values(), *result.buffers.values()]
    tensors += [half.predict(batch), half.logits_by_step(batch[0])]
    assert {value.dtype for value in tensors} == {torch.float32}
    # 8 bits of mantissa; a step moves maxima and kinks, so a gradient may lose a digit more
    torch.testing.assert_close(result.logits, exact.logits, rtol=0.1, atol=0.1)
    assert 1e-4 < relative_error(flat(result.grads), flat(exact.grads)) < 0.7
    (chunked, _) = half.chunk_gradients(batch)
    assert torch.isfinite(flat(chunked.grads)).all()


def test_convolutions_see_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    convolve = torch.nn.functional.conv2d

    def spy(x, *args):
        seen.add(x.dtype)
        return convolve(x, *args)

    half = of_precision(torch.bfloat16, "mixed_mode", "transductive", True)
    monkeypatch.setattr("raymaml.models.closed_rules.duals.F.conv2d", spy)
    half.episode_gradient(episodes(dtype=torch.float32)[0])
    assert seen == {torch.bfloat16}
