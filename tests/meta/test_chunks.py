"""Several episodes at once, by vmap, beside one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_meta import build, episodes, flat, relative_error

from raymaml.meta.methods import METHODS
from raymaml.models.policies import POLICIES

CASES = [
    ("convnet4", "transductive", "learned", {}, ()),
    ("convnet4", "transductive", "zero", {"momentum": 0.9}, ("encoder.conv1",)),
    ("convnet4", "context", "shared", {"weight_decay": 0.05}, ("*.norm",)),
    ("resnet12", "transductive", "learned", {"momentum": 0.9, "weight_decay": 0.05}, ()),
    ("resnet10", "layer", "learned", {}, ("head",)),
    *(("convnet4", norm, "learned", {}, ()) for norm in POLICIES),
]
METHOD_NAMES = ["unrolled", "checkpointed", "mixed_mode", "first_order"]


@pytest.mark.parametrize(("encoder", "norm", "head", "rule", "frozen"), CASES)
def test_a_chunk_is_the_loop(encoder, norm, head, rule, frozen) -> None:
    batch = episodes(3)
    for gradient in METHOD_NAMES:
        learner = build(encoder, norm, head, frozen=frozen, gradient=gradient, **rule)
        found = learner.chunk_gradients(batch)
        assert len(found) == 3
        for result, episode in zip(found, batch, strict=True):
            wanted = learner.episode_gradient(episode)
            torch.testing.assert_close(result.loss, wanted.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.logits, wanted.logits, rtol=1e-10, atol=1e-10)
            assert relative_error(flat(result.grads), flat(wanted.grads)) < 1e-10, gradient
            assert result.grads.keys() == wanted.grads.keys()
            for name, value in wanted.buffers.items():
                torch.testing.assert_close(result.buffers[name], value)


def test_in_float32_a_chunk_is_the_loop_to_rounding() -> None:
    batch = episodes(2)
    batch = replace(batch, support_x=batch.support_x.float(), query_x=batch.query_x.float())
    for gradient in METHOD_NAMES:
        learner = build("convnet4", "transductive", "learned", gradient=gradient)
        learner.model.float()
        for result, episode in zip(learner.chunk_gradients(batch), batch, strict=True):
            wanted = learner.episode_gradient(episode)
            torch.testing.assert_close(result.logits, wanted.logits, rtol=5e-6, atol=5e-6)
            assert relative_error(flat(result.grads), flat(wanted.grads)) < 5e-6, gradient


def test_one_episode_is_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build("convnet4", "transductive", "learned")
    batch = next(episodes(2).chunks(1))
    (found,) = learner.chunk_gradients(batch)
    assert torch.equal(flat(found.grads), flat(learner.episode_gradient(batch[0]).grads))
    monkeypatch.setattr("raymaml.meta.passes.vmap", None)
    learner.chunk_gradients(batch)  # without vmap


def test_chunks_cover_a_batch_in_order() -> None:
    batch = episodes(5)
    sizes = [len(chunk) for chunk in batch.chunks(2)]
    assert sizes == [2, 2, 1]
    joined = torch.cat([chunk.support_x for chunk in batch.chunks(2)])
    assert torch.equal(joined, batch.support_x)


def test_auto_is_exact_in_a_loop_of_ones_own() -> None:
    assert METHODS["auto"] is METHODS["checkpointed"]
    learner = build("convnet4", "transductive", "learned", gradient="auto")
    wanted = build("convnet4", "transductive", "learned").episode_gradient(episodes()[0])
    found = learner.episode_gradient(episodes()[0])
    assert relative_error(flat(found.grads), flat(wanted.grads)) < 1e-12
