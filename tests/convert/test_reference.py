"""Gradients of the reference that are not ours: moments moved in place, decay in first order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_reference import ReferenceLearner, with_their_gradients
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from raymaml import EpisodeBatch, MetaLearner
from raymaml.convert import from_reference
from raymaml.models.norm import RunningNorm2d

CONFIG: dict[str, Any] = {
    "encoder": "convnet4",
    "encoder_args": {"bn_args": {"track_running_stats": True}},
    "image_size": 16,
    "inner_args": {"n_step": 2, "encoder_lr": 0.1, "classifier_lr": 0.2},
}


def theirs(config: dict[str, Any]) -> ReferenceLearner:
    return with_their_gradients(from_reference(config, None))


def episodes(count: int, dtype: torch.dtype = torch.float32) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(count, 1)
    return EpisodeBatch(
        support_x=torch.rand(count, 5, 3, 16, 16, generator=generator).to(dtype),
        support_y=labels,
        query_x=torch.rand(count, 10, 3, 16, 16, generator=generator).to(dtype),
        query_y=labels.repeat(1, 2),
    )


def in_place_gradient(learner: MetaLearner, batch: EpisodeBatch) -> dict[str, Tensor]:
    """MAML with one graph over the meta-batch, the moments changed in place, as it came."""
    model = learner.model.train()
    layers = [m for m in model.modules() if isinstance(m, RunningNorm2d)]
    moments = {id(m): (m.mean.clone(), m.var.clone()) for m in layers}
    role = ["support"]

    def normalise(layer: RunningNorm2d, x: Tensor, window: int) -> Tensor:
        moving = role[0] == "support"
        x = F.batch_norm(
            x, *moments[id(layer)], layer.weight, layer.bias, moving, layer.momentum, layer.eps
        )
        return F.max_pool2d(x, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_reference.ReferenceRunningNorm2d.forward", normalise)
        theta = dict(model.named_parameters())
        losses = []
        for episode in batch:
            fast = theta
            role[0] = "support"
            for _ in range(2):
                logits = functional_call(model, fast, (episode.support_x,))
                loss = F.cross_entropy(logits, episode.support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {
                    name: value - (0.2 if name.startswith("head") else 0.1) * grad
                    for (name, value), grad in zip(fast.items(), grads, strict=True)
                }
            role[0] = "query"
            logits = functional_call(model, fast, (episode.query_x,))
            losses.append(F.cross_entropy(logits, episode.query_y))
        total = torch.stack(losses).mean()
        return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed"])
def test_the_converted_learner_has_the_gradient_of_moments_moved_in_place(gradient: str) -> None:
    learner = theirs(CONFIG)
    learner.model.double()
    learner.inner = learner.inner.model_copy(update={"gradient": gradient})
    batch = episodes(3, torch.float64)
    wanted = in_place_gradient(learner, batch)
    before = {name: value.clone() for name, value in learner.moments.items()}
    _, _, found = learner.meta_gradient(batch)
    assert relative_error(found, wanted) < 1e-10
    exact = MetaLearner.meta_gradient(learner, batch)[2]
    assert relative_error(exact, wanted) > 1e-4  # the artefact
    for name, value in learner.moments.items():
        assert torch.equal(value, before[name])


def test_of_one_episode_the_gradient_is_exact() -> None:
    learner = theirs(CONFIG)
    found = learner.meta_gradient(episodes(1))[2]
    exact = MetaLearner.meta_gradient(learner, episodes(1))[2]
    assert relative_error(found, exact) < 1e-5


def test_first_order_is_differentiated_through_weight_decay_as_in_the_reference() -> None:
    inner = {"first_order": True, "weight_decay": 0.1, "momentum": 0.5, "frozen": ["conv1"]}
    config = {**CONFIG, "inner_args": {**CONFIG["inner_args"], **inner}}
    config["encoder_args"] = {"bn_args": {"track_running_stats": False}}
    learner = theirs(config)
    found = learner.episode_gradient(episodes(1)[0]).grads
    plain = MetaLearner.episode_gradient(learner, episodes(1)[0]).grads
    # v1 = g1 + decay w0; w1 = w0 - lr v1; v2 = momentum v1 + g2 + decay w1; w2 = w1 - lr v2
    for name, grad in found.items():
        lr = 0.2 if name.startswith("head") else 0.1
        first = 1 - lr * 0.1
        factor = first - lr * (0.5 * 0.1 + 0.1 * first)
        frozen = name.startswith("encoder.conv1.")
        torch.testing.assert_close(grad, plain[name] * (1 if frozen else factor))
