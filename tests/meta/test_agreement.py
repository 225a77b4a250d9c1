# ruff: noqa: NPY002 (the numbers that a user's module may draw from)
"""The method of the meta-gradient is compared with ``unrolled`` on a user's own model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers_meta import METHODS, WAYS, Graph, build, episodes
from torch import Tensor, nn

from raymaml import check_gradient
from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig
from raymaml.meta import agreement
from raymaml.meta.agreement import difference, made_up_episode
from raymaml.meta.learner import MetaLearner
from raymaml.models.policies import POLICIES


class Average(Graph):
    """A moving average and a counter, in place."""

    def hang(self) -> None:
        self.register_buffer("average", torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def encode(self, x: Tensor) -> Tensor:
        out = super().encode(x)
        if self.training:
            self.count += 1
            self.average.mul_(0.5).add_(0.5 * out.detach().abs().mean(0))
        return out / self.average * self.count


class Attached(Average):
    """A moving average that is not detached."""

    def encode(self, x: Tensor) -> Tensor:
        out = Graph.encode(self, x)
        self.average = 0.5 * self.average + 0.5 * out.abs().mean(0)
        return out / self.average


def changed(name: str, change: Callable[[Tensor], Tensor]) -> type[Graph]:
    """A model whose features ``change`` changes."""
    encode = lambda self, x: change(Graph.encode(self, x))  # noqa: E731
    return type(name, (Graph,), {"encode": encode})


Dropout = changed("Dropout", lambda out: nn.functional.dropout(out, 0.5))
NoGrad = changed("NoGrad", lambda out: out / torch.no_grad()(lambda: out.abs().mean(0))())
Detached = changed("Detached", lambda out: out / out.detach().abs().mean(0))
Item = changed("Item", lambda out: out / out.abs().mean().item())
PythonsNumbers = changed("PythonsNumbers", lambda out: out * (0.5 + random.random()))
NumpysNumbers = changed("NumpysNumbers", lambda out: out * (0.5 + float(np.random.random())))


class Outside(Graph):
    """State that is no part of the model."""

    calls: list[int]

    def encode(self, x: Tensor) -> Tensor:
        type(self).calls.append(1)
        return super().encode(x) * len(self.calls)


class Float32Only(NoGrad):
    def encode(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().encode(x)


class NoCopies(NoGrad):
    """Keeps a tensor that has a history, which cannot be copied, as hooks on weights do."""

    def hang(self) -> None:
        self.doubled = 2 * self.a.weight


class Recomputes(Graph):
    def encode(self, x: Tensor) -> Any:
        encode = super().encode
        return torch.utils.checkpoint.checkpoint(encode, x, use_reentrant=False)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


Once = changed("Once", _Square.apply)


def learner(model: type[Graph], gradient: str) -> MetaLearner:
    torch.manual_seed(1)
    Outside.calls = []
    return MetaLearner(model(), InnerConfig(num_steps=5, lr=0.3, gradient=gradient))


AGREE = [
    *((model, method) for model in (Graph, Average, Attached, Dropout) for method in METHODS),
    *((model, "checkpointed") for model in (NoGrad, Detached, Item)),
    *((model, "unrolled") for model in (PythonsNumbers, NumpysNumbers, Float32Only)),
    *((model, "first_order") for model in (PythonsNumbers, NoGrad, Once)),
    *((model, "mixed_mode") for model in (Detached, Item)),
]


@pytest.mark.parametrize(("model", "method"), AGREE)
def test_a_model_that_the_method_is_right_for_passes(model: type[Graph], method: str) -> None:
    check_gradient(learner(model, method), episodes(size=4)[0])


@pytest.mark.parametrize(
    ("model", "method"),
    [
        *((model, "mixed_mode") for model in (NoGrad, Float32Only, NoCopies)),
        *((model, "checkpointed") for model in (PythonsNumbers, NumpysNumbers)),
    ],
)
def test_a_method_that_disagrees_is_refused_with_both_numbers(
    model: type[Graph], method: str
) -> None:
    maml = learner(model, method)
    number = r"(\d[\d.e+-]*)"
    says = rf"inner\.gradient: {method} .* length {number} .* unrolled one of length {number};"
    with pytest.raises(UserError, match=says) as caught:
        check_gradient(maml, episodes(size=4)[0])
    assert str(caught.value).endswith("set inner.gradient: unrolled")


@pytest.mark.parametrize("method", ["auto", "unrolled", "checkpointed"])
def test_a_second_derivative_that_is_left_out_is_refused(method: str) -> None:
    """PyTorch says nothing: the derivative of x * x is 2 x, that of 2 x by _Square is missing."""
    with pytest.raises(UserError, match=r"once_differentiable, .* inner\.gradient: first_order"):
        check_gradient(learner(Once, method), episodes(size=4)[0])


class InAnObject(Graph):
    """State in an object that no pass looks into."""

    def hang(self) -> None:
        self.tally = SimpleNamespace(calls=0)

    def encode(self, x: Tensor) -> Tensor:
        self.tally.calls += 1
        return super().encode(x) * self.tally.calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [Outside, InAnObject])
def test_state_outside_of_the_modules_is_refused(model: type[Graph], method: str) -> None:
    says = r"model: gives a meta-gradient of length .* the same one again: .* in a buffer"
    with pytest.raises(UserError, match=says):
        check_gradient(learner(model, method), episodes(size=4)[0])


class EndsInFloat(Graph):
    """float32 for the head, whatever comes in."""

    def forward(self, x: Tensor) -> Any:
        features = self.encode(x.flatten(1)).float()
        if features.dtype != self.head.weight.dtype:
            raise UserError("features of type torch.float32")
        return self.head(features)


class RecomputesInFloat(EndsInFloat, Recomputes):
    pass


@pytest.mark.parametrize(
    ("model", "method"),
    [*((Recomputes, method) for method in METHODS), (RecomputesInFloat, "checkpointed")],
)
def test_a_model_that_recomputes_a_layer_with_other_weights_is_refused(
    model: type[Graph], method: str
) -> None:
    maml = learner(model, method)
    with pytest.raises(UserError, match=r"model: runs again .* torch\.utils\.checkpoint out of it"):
        check_gradient(maml, made_up_episode((1, 4, 4), WAYS, torch.device("cpu")))
    assert not any(module._forward_pre_hooks for module in maml.model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_for_float32_alone_is_compared_in_float32(method: str) -> None:
    maml = learner(EndsInFloat, method)
    check_gradient(maml, made_up_episode((1, 4, 4), WAYS, torch.device("cpu")))
    assert not any(module._forward_pre_hooks for module in maml.model.modules())


@pytest.mark.parametrize("inner", [{"frozen": ("a.*", "b.*")}, {"num_steps": 0}])
@pytest.mark.parametrize("method", ["auto", "unrolled", "checkpointed"])
def test_a_derivative_that_is_not_needed_twice_may_be_left_out(method: str, inner: Any) -> None:
    """The inner steps of a head do not lead through the encoder: its first derivative is enough."""
    torch.manual_seed(1)
    config = InnerConfig(**{"num_steps": 2, "lr": 0.3, "gradient": method, **inner})
    check_gradient(MetaLearner(Once(), config), episodes(size=4)[0])


class _SquareForward(_Square):
    """Has a forward derivative as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        return _Square.forward(ctx, x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent * ctx.saved_tensors[0]


def test_what_could_not_be_compared_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_gradient(
        learner(changed("OnceForward", _SquareForward.apply), "mixed_mode"), episodes(size=4)[0]
    )
    assert "mixed_mode could not be compared with unrolled" in caplog.text
    caplog.clear()
    check_gradient(learner(Graph, "mixed_mode"), episodes(size=4)[0])
    assert not caplog.text


def seeded_numbers(meanwhile: Callable[[], None] = lambda: None) -> tuple[Any, float, float]:
    """Draw from every generator after it is seeded, and something else has run."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    meanwhile()
    return torch.rand(1), random.random(), np.random.random()


@pytest.mark.parametrize("model", [Average, Dropout, PythonsNumbers, Float32Only])
def test_a_comparison_leaves_no_trace(model: type[Graph]) -> None:
    maml = learner(model, "unrolled")
    before = {name: value.clone() for name, value in maml.model.state_dict().items()}
    wanted = seeded_numbers()
    assert seeded_numbers(lambda: check_gradient(maml, episodes(size=4)[0])) == wanted
    assert all(torch.equal(value, before[n]) for n, value in maml.model.state_dict().items())
    assert all(parameter.grad is None for parameter in maml.model.parameters())
    assert not any(module._forward_pre_hooks for module in maml.model.modules())
    assert maml.inner == InnerConfig(num_steps=5, lr=0.3, gradient="unrolled")


@pytest.mark.parametrize(("exact", "agrees"), [(1.0, False), (math.nan, True)])
def test_a_gradient_that_is_not_finite_disagrees_unless_the_exact_one_is_so(
    exact: float, agrees: bool
) -> None:
    problem = difference("mixed_mode", torch.tensor([math.nan]), torch.tensor([exact]), 1e-4)
    assert (problem is None) is agrees  # of the other case the first step of a run says so


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_all_methods_agree_far_within_the_tolerance(
    norm: str, half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agreement.TOLERANCE[torch.float64] == 1e-4
    monkeypatch.setattr(agreement, "TOLERANCE", {torch.float64: 1e-7})  # and no other type
    for method in ("checkpointed", "mixed_mode"):
        maml = build(norm=norm, gradient=method)
        maml.model.float()
        maml.half_precision = half  # compared without it
        check_gradient(maml, made_up_episode((1, 16, 16), WAYS, torch.device("cpu")))
