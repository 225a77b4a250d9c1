# ruff: noqa: NPY002 (the numbers that a user's module may draw from)
"""The method of the meta-gradient is compared with ``unrolled`` on a user's own model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers_meta import METHODS, WAYS, Graph, build, changed, episodes, learner
from torch import Tensor, nn

from raymaml import check_gradient
from raymaml.common.errors import UserError
from raymaml.training import agreement
from raymaml.training.agreement import difference, made_up_episode


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


class Outside(Graph):
    """State in the class, which is no part of the model."""

    calls: list[int]

    def hang(self) -> None:
        type(self).calls = []

    def encode(self, x: Tensor) -> Tensor:
        type(self).calls.append(1)
        return super().encode(x) * len(self.calls)


class InAnObject(Graph):
    """State in an object that no pass looks into."""

    def hang(self) -> None:
        self.tally = SimpleNamespace(calls=0)

    def encode(self, x: Tensor) -> Tensor:
        self.tally.calls += 1
        return super().encode(x) * self.tally.calls


class Recomputes(Graph):
    def encode(self, x: Tensor) -> Any:
        encode = super().encode
        return torch.utils.checkpoint.checkpoint(encode, x, use_reentrant=False)


class EndsInFloat(Graph):
    """float32 for the head, whatever comes in."""

    def forward(self, x: Tensor) -> Any:
        features = self.encode(x.flatten(1)).float()
        if features.dtype != self.head.weight.dtype:
            raise UserError("features of type torch.float32")
        return self.head(features)


class RecomputesInFloat(EndsInFloat, Recomputes):
    pass


class _Square(torch.autograd.Function):
    """PyTorch says nothing: the derivative of x * x is 2 x, that of 2 x is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent * ctx.saved_tensors[0]


def without_gradient(out: Tensor) -> Tensor:
    return out / torch.no_grad()(lambda: out.abs().mean(0))()


class Float32Only(Graph):
    def encode(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return without_gradient(super().encode(x))


class NoCopies(Graph):
    """Keeps a tensor that has a history, which cannot be copied, as hooks on weights do."""

    def hang(self) -> None:
        self.doubled = 2 * self.a.weight

    def encode(self, x: Tensor) -> Tensor:
        return without_gradient(super().encode(x))


Dropout = changed(lambda out: nn.functional.dropout(out, 0.5))
NoGrad = changed(without_gradient)
Detached = changed(lambda out: out / out.detach().abs().mean(0))
Item = changed(lambda out: out / out.abs().mean().item())
PythonsNumbers = changed(lambda out: out * (0.5 + random.random()))
NumpysNumbers = changed(lambda out: out * (0.5 + float(np.random.random())))
Once = changed(_Square.apply)

SECOND_ORDER = METHODS[:3]
NUMBER = r"(\d[\d.e+-]*)"
DISAGREES = rf"{{method}} .* length {NUMBER} .* unrolled one of length {NUMBER};.* set inner\.grad"
LEFT_OUT = r"inner\.gradient: .* once_differentiable, .* inner\.gradient: first_order"
STATE = r"model: gives a meta-gradient of length .* the same one again: .* in a buffer"
RUNS_AGAIN = r"model: runs again .* torch\.utils\.checkpoint out of it"
CHECKS: list[tuple[Iterable[type[Graph]], Iterable[str], str]] = [
    ([Graph, Average, Attached, Dropout, EndsInFloat], METHODS, ""),
    ([Detached, Item], ["checkpointed", "mixed_mode"], ""),
    ([PythonsNumbers, NumpysNumbers, Float32Only], ["unrolled"], ""),
    ([PythonsNumbers, NoGrad, Once], ["first_order"], ""),
    ([NoGrad], ["checkpointed"], ""),
    ([NoGrad, Float32Only, NoCopies], ["mixed_mode"], DISAGREES),
    ([PythonsNumbers, NumpysNumbers], ["checkpointed"], DISAGREES),
    ([Once], ["auto", "unrolled", "checkpointed"], LEFT_OUT),
    ([Outside, InAnObject], METHODS, STATE),
    ([Recomputes], METHODS, RUNS_AGAIN),
    ([RecomputesInFloat], ["checkpointed"], RUNS_AGAIN),
]


def drawn() -> list[object]:
    return [torch.rand(2).tolist(), random.random(), np.random.random()]


def seed() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.parametrize(
    ("model", "method", "says"),
    [(model, method, says) for models, ways, says in CHECKS for model in models for method in ways],
)
def test_a_method_that_is_wrong_for_a_model_is_refused_and_no_trace_is_left(
    model: type[Graph], method: str, says: str
) -> None:
    maml = learner(model, method, num_steps=5)
    inner, before = maml.inner, {n: v.clone() for n, v in maml.model.state_dict().items()}
    seed()
    wanted = drawn()
    seed()
    refused = pytest.raises(UserError, match=says.format(method=method)) if says else nullcontext()
    with refused:
        check_gradient(maml, made_up_episode((1, 4, 4), WAYS, torch.device("cpu")))
    assert drawn() == wanted
    assert all(torch.equal(value, before[n]) for n, value in maml.model.state_dict().items())
    assert all(parameter.grad is None for parameter in maml.model.parameters())
    assert not any(module._forward_pre_hooks for module in maml.model.modules())
    assert maml.inner == inner


@pytest.mark.parametrize("inner", [{"frozen": ("a.*", "b.*")}, {"num_steps": 0}])
@pytest.mark.parametrize("method", ["auto", "unrolled", "checkpointed"])
def test_a_derivative_that_is_not_needed_twice_may_be_left_out(method: str, inner: Any) -> None:
    """The inner steps of a head do not lead through the encoder: its first derivative is enough."""
    check_gradient(learner(Once, method, **inner), episodes(size=4)[0])


def test_a_method_that_could_not_be_compared_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check_gradient(learner(Once, "mixed_mode"), episodes(size=4)[0])
    assert "mixed_mode could not be compared with unrolled" in caplog.text
    caplog.clear()
    check_gradient(learner(Graph, "mixed_mode"), episodes(size=4)[0])
    assert not caplog.text


@pytest.mark.parametrize(("exact", "agrees"), [(1.0, False), (math.nan, True)])
def test_a_gradient_that_is_not_finite_disagrees_unless_the_exact_one_is_so(
    exact: float, agrees: bool
) -> None:
    problem = difference("mixed_mode", torch.tensor([math.nan]), torch.tensor([exact]), 1e-4)
    assert (problem is None) is agrees  # of the other case the first step of a run says so


@pytest.mark.parametrize("method", ["checkpointed", "mixed_mode"])
def test_methods_are_compared_in_float64_whatever_the_precision(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agreement.TOLERANCE[torch.float64] == 1e-4
    monkeypatch.setattr(agreement, "TOLERANCE", {torch.float64: 1e-7})  # and no other type
    maml = build(gradient=method)
    maml.model.float()
    maml.half_precision = torch.bfloat16
    check_gradient(maml, made_up_episode((1, 16, 16), WAYS, torch.device("cpu")))
