"""Several episodes at once, by vmap, beside one after the other."""

from __future__ import annotations

import pytest
import torch
from helpers_meta import METHODS, build, episodes, flat, relative_error

from raymaml.models.policies import POLICIES

CASES = [
    ("convnet4", "transductive", "zero", {"momentum": 0.9}, ("encoder.conv1",)),
    ("convnet4", "context", "shared", {"weight_decay": 0.05}, ("*.norm",)),
    ("resnet12", "transductive", "learned", {"momentum": 0.9, "weight_decay": 0.05}, ()),
    ("resnet10", "layer", "learned", {}, ("head",)),
    *(("convnet4", norm, "learned", {}, ()) for norm in POLICIES),
]


@pytest.mark.parametrize(("encoder", "norm", "head", "rule", "frozen"), CASES)
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
    monkeypatch.setattr("raymaml.meta.forward.vmap", None)
    learner, batch = build(), next(episodes(2).chunks(1))
    (found,) = learner.chunk_gradients(batch)
    assert torch.equal(flat(found.grads), flat(learner.episode_gradient(batch[0]).grads))


def test_chunks_cover_a_batch_in_order() -> None:
    chunks = list(episodes(5).chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([chunk.support_x for chunk in chunks]), episodes(5).support_x)
