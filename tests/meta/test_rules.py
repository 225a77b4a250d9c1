"""Each rule: its steps are PyTorch's, its corners, and rules of one's own (float64)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers_meta import build, episodes, flat, relative_error
from helpers_quadratic import episode, half_of_squares, joined, line, matrix
from torch import Tensor, nn

import raymaml
from raymaml.common.errors import UserError
from raymaml.meta.learner import MetaLearner
from raymaml.meta.rules.rmsprop import RMSProp


def parts(model: Any) -> list[tuple[nn.Module, float]]:
    return [(model.encoder, 0.1), (model.head, 0.05)]


OPTIMIZERS: list[tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = [
    (
        {"momentum": 0.7, "weight_decay": 0.3},
        torch.optim.SGD,
        {"momentum": 0.7, "weight_decay": 0.3},
    ),
    ({"rule": "adam", "weight_decay": 0.3}, torch.optim.Adam, {"weight_decay": 0.3}),
    (
        {"rule": "adam", "rule_args": {"beta1": 0.5, "beta2": 0.7, "epsilon": 1e-3}},
        torch.optim.Adam,
        {"betas": (0.5, 0.7), "eps": 1e-3},
    ),
]


@pytest.mark.parametrize(("inner", "kind", "args"), OPTIMIZERS)
def test_steps_are_those_of_torch_optim(inner: Any, kind: Any, args: Any) -> None:
    learner, one = line(num_steps=6, **inner), episode()
    states, model = list(learner.adapt(one)), line().model
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in parts(model)]
    optimizer = kind(groups, **args)
    for fast in states[1:]:
        optimizer.zero_grad()
        half_of_squares(model(one.support_x), one.support_y).backward()
        optimizer.step()
        now = joined(dict(model.named_parameters()))
        np.testing.assert_allclose(joined(fast.params), now, rtol=1e-13, atol=1e-14)


def test_rmsprop_is_torchs_from_the_first_square_on() -> None:
    """PyTorch's average starts at 0 unless it is set, and its epsilon is outside of the root."""
    rule, generator = RMSProp({"beta": 0.8, "epsilon": 1e-300}), torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(4))
    params, other = {"w": start}, torch.nn.Parameter(start.clone())
    state = rule.init(params)
    optimizer = torch.optim.RMSprop([other], lr=0.1, alpha=0.8, eps=0)
    optimizer.state[other] = {"step": torch.zeros(()), "square_avg": grads[0] ** 2}
    for number, grad in enumerate(grads):
        meta = {**rule.fixed, "lr.w": 0.1}
        params, state = rule.update({"w": grad}, state, params, meta, number)
        other.grad = grad
        optimizer.step()
        torch.testing.assert_close(params["w"], other.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode", "first_order"])
@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_zero_gradients_move_nothing_and_have_finite_derivatives(rule: str, gradient: str) -> None:
    """A pixel that is 0 in all images gives its weight gradients of exactly 0."""
    numbers = {"adam": ["beta1", "beta2", "epsilon"], "rmsprop": ["beta", "epsilon"]}[rule]
    learner = line(rule=rule, gradient=gradient, learned=numbers, rates="per_parameter")
    still = episode()
    still.support_x[:, 1] = 0
    for fast in learner.adapt(still):
        assert torch.equal(fast.params["encoder.weight"][0, 1], learner.model.encoder.weight[0, 1])
    grads = learner.episode_gradient(still).grads
    assert all(value.isfinite().all() for value in grads.values())
    assert grads["rule.lr.encoder.weight"][0, 1] == 0
    assert grads["encoder.weight"][0, 1] != 0  # the query loss depends on it


def test_learned_rates_start_as_the_config_says() -> None:
    shared = line(rates="shared").learned
    assert {name: value.item() for name, value in shared.items()} == {"lr": 0.1, "head_lr": 0.05}
    drawn, again = (
        line(rates="per_parameter", lr_range=[0.2, 0.4]).learned["lr.head.weight"] for _ in range(2)
    )
    assert torch.equal(drawn, again)
    assert 0.2 <= drawn.min() < drawn.max() <= 0.4
    model, inner = line().model, line(rates="per_parameter", lr_range=[0.2, 0.4]).inner
    assert not torch.equal(MetaLearner(model, inner, seed=1).learned["lr.head.weight"], drawn)
    by_step = build(rates="per_tensor_per_step", head="zero", num_steps=4).learned
    assert {tuple(value.shape) for value in by_step.values()} == {(4,)}


def test_further_steps_at_test_take_the_rates_of_the_last() -> None:
    built, one = line(rates="per_tensor_per_step", num_steps=2), episode()
    with torch.no_grad():
        for value in built.learned.values():
            value[1] = 0.02
    longer = built.inner.model_copy(update={"num_steps": 4})
    longer_learner = MetaLearner(
        built.model, built.inner, loss_fn=half_of_squares, test_inner=longer
    )
    longer_learner.rule = built.rule
    two, three, four = list(longer_learner.adapt(one))[2:]
    for before, after in ((two, three), (three, four)):
        x, phi = one.support_x.numpy(), joined(before.params)
        grad = x.T @ (x @ phi - one.support_y.numpy()[:, 0])
        np.testing.assert_allclose(joined(after.params), phi - 0.02 * grad, rtol=1e-13)


def test_first_order_with_learned_rates_takes_inner_gradients_for_constants() -> None:
    learner, one = (
        line(gradient="first_order", rates="per_tensor_per_step", momentum=0.5),
        episode(),
    )
    theta = [p.detach().requires_grad_() for p in learner.model.parameters()]
    rates = {n: v.detach().requires_grad_() for n, v in learner.learned.items()}
    by_tensor, phi, moves = list(rates.values()), list(theta), [torch.zeros_like(p) for p in theta]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return half_of_squares(x[:, :2] @ weights[0].T + x[:, 2:] @ weights[1].T, y)

    for step in range(3):
        found = torch.autograd.grad(loss(phi, one.support_x, one.support_y), phi, retain_graph=True)
        moves = [0.5 * move + grad.detach() for move, grad in zip(moves, found, strict=True)]
        phi = [p - r[step] * m for p, r, m in zip(phi, by_tensor, moves, strict=True)]
    loss(phi, one.query_x, one.query_y).backward()
    grads = learner.episode_gradient(one).grads
    for name, value in [*learner.model.named_parameters()]:
        wanted = theta[0] if name.startswith("encoder") else theta[1]
        torch.testing.assert_close(grads[name], wanted.grad, rtol=1e-13, atol=1e-13)
        assert value.grad is None
    for name, rate in rates.items():
        torch.testing.assert_close(grads[f"rule.{name}"], rate.grad, rtol=1e-13, atol=1e-13)


def test_first_order_until_an_outer_step() -> None:
    one, inner = episodes()[0], {"first_order_steps": 3, "gradient": "mixed_mode"}
    first, exact = (
        flat(build(gradient=g).episode_gradient(one).grads) for g in ("first_order", "unrolled")
    )
    learner = build(**inner)
    for outer_step, wanted in ((0, first), (2, first), (3, exact), (None, exact)):
        found = flat(learner.episode_gradient(one, outer_step).grads)
        assert relative_error(found, wanted) < 1e-10
    assert relative_error(first, exact) > 1e-2


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("no_such_module:Rule", "no_such_module:Rule cannot be imported (ModuleNotFoundError"),
        ("helpers_rules:Missing", "helpers_rules:Missing cannot be imported (AttributeError"),
        ("helpers_rules:NotARule", "and no subclass of raymaml.Rule"),
        ("helpers_rules:NotAClass", "is 3, and no subclass of raymaml.Rule"),
    ],
)
def test_what_is_no_rule_is_refused(rule: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        line(rule=rule)


def test_numbers_that_an_own_rule_lacks_are_named_with_those_it_has() -> None:
    with pytest.raises(UserError, match=r"Damped has no size\b") as error:
        line(rule="helpers_rules:Damped", rule_args={"size": 1.0})
    assert "memory, damping" in str(error.value)


def test_the_rule_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(raymaml.__file__).parent / "meta" / "README.md").read_text("utf-8")
    (block,) = re.findall(r"(?ms)^    # the module my_rules\n.*?(?=^\S)", page)
    module = ModuleType("my_rules")
    exec(re.sub("(?m)^    ", "", block), vars(module))
    monkeypatch.setitem(sys.modules, "my_rules", module)
    inner = {"rule": "my_rules:Sign", "learned": ["width"], "rates": "shared", "head_lr": None}
    (a, b), one = matrix("support"), episode()
    *_, last = line(**inner).adapt(one)
    phi, mean = joined(line().params), 0.0
    for _ in range(3):
        mean = 0.9 * mean + 0.1 * (a @ phi - b)
        phi = phi - 0.1 * np.tanh(mean / 0.01)
    np.testing.assert_allclose(joined(last.params), phi, rtol=1e-12)
    methods = ("unrolled", "mixed_mode")
    grads = [line(**inner, gradient=each).episode_gradient(one).grads for each in methods]
    assert grads[0].keys() >= {"rule.width", "rule.lr", "head.weight"}
    assert relative_error(flat(grads[1]), flat(grads[0])) < 1e-12
