"""Autocast in bfloat16: convolutions and products alone are in half precision."""

from __future__ import annotations

import pytest
import torch
from helpers_meta import METHODS, build, episodes, flat, relative_error

from raymaml.meta.learner import MetaLearner


def learner(half: torch.dtype | None, gradient: str, norm: str, layout: bool) -> MetaLearner:
    built = build(norm=norm, gradient=gradient)
    model = built.model.float()
    return MetaLearner(model, built.inner, channels_last=layout, half_precision=half)


@pytest.mark.parametrize("gradient", METHODS)
@pytest.mark.parametrize("norm", ["transductive", "context", "running", "tasknorm_i", "layer"])
@pytest.mark.parametrize("layout", [False, True])
def test_only_convolutions_and_products_lose_digits(gradient, norm, layout: bool) -> None:
    batch = episodes(2, dtype=torch.float32)
    exact = learner(None, gradient, norm, layout).episode_gradient(batch[0])
    half = learner(torch.bfloat16, gradient, norm, layout)
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

    half = learner(torch.bfloat16, "mixed_mode", "transductive", True)
    monkeypatch.setattr("raymaml.models.closed_rules.duals.F.conv2d", spy)
    half.episode_gradient(episodes(dtype=torch.float32)[0])
    assert seen == {torch.bfloat16}
