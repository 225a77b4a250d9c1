"""On quadratic losses every rule's meta-gradient is a product of matrices, written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_quadratic import (
    SIZE,
    STEPS,
    TENSOR,
    Array,
    Rule,
    Step,
    by_hand,
    episode,
    joined,
    line,
    matrix,
)

A, B = matrix("support")
EYE, ZERO = np.eye(SIZE), np.zeros((SIZE, SIZE))
RATES = np.array([0.1, 0.05])[TENSOR]
EXACT = ["unrolled", "checkpointed", "mixed_mode"]


def sgd(rates: Array = RATES, momentum: float = 0.0, decay: float = 0.0) -> Rule:
    """v' = m v + g;  phi' = phi - r v',  with g = (A + decay) phi - b."""
    a = A + decay * EYE

    def step(values: Array, number: int) -> Step:
        phi, v = values[:SIZE], values[SIZE:]
        r = rates[number] if rates.ndim == 2 else rates
        move = momentum * v + a @ phi - B
        return Step(
            after=np.concatenate([phi - r * move, move]),
            jacobian=np.block(
                [[EYE - r[:, None] * a, -momentum * np.diag(r)], [a, momentum * EYE]]
            ),
            move=move,
            numbers={"momentum": np.concatenate([-r * v, v])},
        )

    return step


def rmsprop(beta: float, epsilon: float) -> Rule:
    """s' = beta s + (1 - beta) g^2, at first g^2;  phi' = phi - r g / sqrt(s' + epsilon)."""

    def step(values: Array, number: int) -> Step:
        (phi, s), kept = np.split(values, 2), beta if number else 0.0
        g = A @ phi - B
        after = kept * s + (1 - kept) * g**2
        root = np.sqrt(after + epsilon)
        by_square = RATES * g / root**3 / 2  # d phi' / d s'
        square_by_phi = (2 * (1 - kept) * g)[:, None] * A
        phi_by_phi = EYE - (RATES / root)[:, None] * A + by_square[:, None] * square_by_phi
        by_beta = (s - g**2) * bool(number)
        return Step(
            after=np.concatenate([phi - RATES * g / root, after]),
            jacobian=np.block(
                [[phi_by_phi, np.diag(kept * by_square)], [square_by_phi, kept * EYE]]
            ),
            move=g / root,
            numbers={
                "beta": np.concatenate([by_square * by_beta, by_beta]),
                "epsilon": np.concatenate([by_square, np.zeros(SIZE)]),
            },
        )

    return step


def adam(beta1: float, beta2: float, epsilon: float) -> Rule:
    """phi' = phi - r m' / c1 / (sqrt(s' / c2) + epsilon) (Kingma and Ba 2015, algorithm 1)."""

    def step(values: Array, number: int) -> Step:
        (phi, m, s), t = np.split(values, 3), number + 1
        g = A @ phi - B
        mean, square = beta1 * m + (1 - beta1) * g, beta2 * s + (1 - beta2) * g**2
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        root = np.sqrt(square / c2)
        move = mean / c1 / (root + epsilon)
        by_mean = -RATES / c1 / (root + epsilon)  # d phi' / d m'
        by_square = RATES * mean / c1 / (root + epsilon) ** 2 / (2 * root) / c2  # d phi' / d s'
        mean_by_phi, square_by_phi = (1 - beta1) * A, (2 * (1 - beta2) * g)[:, None] * A
        phi_by_phi = EYE + by_mean[:, None] * mean_by_phi + by_square[:, None] * square_by_phi
        # d (m' / c1) / d beta1 = (m - g) / c1 + m' t beta1^(t-1) / c1^2, and so for s^
        by_beta1 = by_mean * (m - g + mean * t * beta1 ** (t - 1) / c1)
        by_beta2 = by_square * (s - g**2 + square * t * beta2 ** (t - 1) / c2)
        none = np.zeros(SIZE)
        return Step(
            after=np.concatenate([phi - RATES * move, mean, square]),
            jacobian=np.block(
                [
                    [phi_by_phi, np.diag(beta1 * by_mean), np.diag(beta2 * by_square)],
                    [mean_by_phi, beta1 * EYE, ZERO],
                    [square_by_phi, ZERO, beta2 * EYE],
                ]
            ),
            move=move,
            numbers={
                "beta1": np.concatenate([by_beta1, m - g, none]),
                "beta2": np.concatenate([by_beta2, none, s - g**2]),
                "epsilon": np.concatenate([RATES * move / (root + epsilon), none, none]),
            },
        )

    return step


def alfa(meta: dict[str, Array]) -> Rule:
    """phi' = (1 - b d) phi - a r g by tensor;  a, b = W2 relu(W1 means + b1) + b2."""
    mean = np.eye(2)[TENSOR].T / np.bincount(TENSOR)[:, None]  # [2, P]

    def step(values: Array, number: int) -> Step:
        phi = values
        g = A @ phi - B
        decay = np.array(
            [meta[f"decay.{name}"][number] for name in ("encoder.weight", "head.weight")]
        )
        means = np.concatenate([mean @ phi, mean @ g])
        hidden = meta["hidden.weight"] @ means + meta["hidden.bias"]
        on = hidden > 0
        found = meta["output.weight"] @ (hidden * on) + meta["output.bias"]
        a, b, d = found[:2][TENSOR], found[2:][TENSOR], decay[TENSOR]
        spread = np.eye(2)[TENSOR]  # d phi' / d (a, b) = -(r g, d phi) of the tensor
        by_output = np.hstack([-(RATES * g)[:, None] * spread, -(d * phi)[:, None] * spread])
        by_hidden = by_output @ meta["output.weight"] * on
        by_means = by_hidden @ meta["hidden.weight"]
        jacobian = np.diag(1 - b * d) - (a * RATES)[:, None] * A
        jacobian += by_means @ np.vstack([mean, mean @ A])
        in_time = np.zeros((STEPS, 2, SIZE))
        in_time[number] = -(b * phi) * spread.T
        return Step(
            after=(1 - b * d) * phi - a * RATES * g,
            jacobian=jacobian,
            move=a * g,
            numbers={
                "output.bias": by_output,
                "output.weight": np.einsum("po,h->poh", by_output, hidden * on).reshape(SIZE, -1),
                "hidden.bias": by_hidden,
                "hidden.weight": np.einsum("ph,m->phm", by_hidden, means).reshape(SIZE, -1),
                "decay": in_time.reshape(-1, SIZE).T,
            },
        )

    return step


def near(found: Any, wanted: Array) -> None:
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    error = np.abs(found.ravel() - np.ravel(wanted)).max()
    assert error < 1e-12 * max(np.abs(wanted).max(), 1e-2)


def start(learner: Any, states: int = 0) -> Array:
    return np.concatenate([joined(dict(learner.model.named_parameters())), np.zeros(states * SIZE)])


@pytest.mark.parametrize("gradient", EXACT)
def test_descent_with_momentum_decay_and_a_multi_step_loss(gradient: str) -> None:
    inner = {"momentum": 0.6, "weight_decay": 0.2, "learned": ["momentum"], "rates": "shared"}
    several = {"num_outer_steps": 4, "num_stages": 4}  # stage 1: 1/3 - 1/12, twice, and the rest
    learner = line(gradient=gradient, multi_step_loss=several, **inner)
    rule = sgd(momentum=0.6, decay=0.2)
    wanted = by_hand(rule, start(learner, 1), weights=(0, 1 / 4, 1 / 4, 1 / 2))
    grads = learner.episode_gradient(episode(), 1).grads
    near(joined(grads), wanted["theta"])
    near(grads["rule.momentum"], wanted["momentum"])
    rates = wanted["rates"].sum(0)
    near(grads["rule.lr"], rates[TENSOR == 0].sum())
    near(grads["rule.head_lr"], rates[TENSOR == 1].sum())


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("rates", ["per_tensor", "per_tensor_per_step", "per_parameter"])
def test_meta_sgd_and_the_rates_of_maml_plus_plus(gradient: str, rates: str) -> None:
    learner = line(gradient=gradient, rates=rates)
    with torch.no_grad():
        for value in learner.learned.values():
            value.add_(torch.linspace(0, 0.05, value.numel(), dtype=value.dtype).view_as(value))
    learned = [learner.learned[f"lr.{n}.weight"].detach().numpy() for n in ("encoder", "head")]
    if rates == "per_parameter":
        by_step = np.tile(np.concatenate([each.ravel() for each in learned]), (STEPS, 1))
    else:
        by_step = np.stack([np.broadcast_to(each, STEPS) for each in learned], 1)[:, TENSOR]
    wanted = by_hand(sgd(by_step), start(learner, 1))
    grads = learner.episode_gradient(episode()).grads
    near(joined(grads), wanted["theta"])
    for number, name in enumerate(("encoder", "head")):
        of_tensor = wanted["rates"][:, number == TENSOR]
        axes = {"per_tensor": (0, 1), "per_tensor_per_step": 1, "per_parameter": 0}[rates]
        near(grads[f"rule.lr.{name}.weight"], of_tensor.sum(axes))


NUMBERS = {
    "rmsprop": (rmsprop, {"beta": 0.7, "epsilon": 1e-6}, 1),
    "adam": (adam, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-8}, 2),
}


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("name", NUMBERS)
def test_rmsprop_and_adam(gradient: str, name: str) -> None:
    rule, args, states = NUMBERS[name]
    inner = {"rule_args": args, "learned": list(args), "rates": "per_tensor"}
    learner = line(rule=name, gradient=gradient, **inner)
    wanted = by_hand(rule(**args), start(learner, states))
    grads = learner.episode_gradient(episode()).grads
    near(joined(grads), wanted["theta"])
    for number in args:
        near(grads[f"rule.{number}"], wanted[number])
    for number, tensor in enumerate(("encoder", "head")):
        near(grads[f"rule.lr.{tensor}.weight"], wanted["rates"][:, number == TENSOR].sum())


@pytest.mark.parametrize("gradient", EXACT)
def test_alfa(gradient: str) -> None:
    learner = line(rule="alfa", rule_args={"decay": 0.4}, gradient=gradient)
    drawn = np.random.default_rng(1)
    with torch.no_grad():
        for value in learner.learned.values():
            value.add_(torch.from_numpy(0.3 * drawn.standard_normal(value.shape)))
    meta = {name: value.detach().numpy() for name, value in learner.learned.items()}
    wanted = by_hand(alfa(meta), start(learner))
    grads = learner.episode_gradient(episode()).grads
    near(joined(grads), wanted["theta"])
    for name in ("output.bias", "output.weight", "hidden.bias", "hidden.weight"):
        near(grads[f"rule.{name}"], wanted[name])
    decays = [grads[f"rule.decay.{name}.weight"].numpy() for name in ("encoder", "head")]
    near(np.stack(decays, 1), wanted["decay"])


@pytest.mark.parametrize("gradient", EXACT)
def test_derivatives_between_steps_are_scaled_to_a_norm(gradient: str) -> None:
    learner = line(gradient=gradient, clip_between=0.8)
    wanted = by_hand(sgd(), start(learner, 1), clip=0.8)["theta"]
    assert 0.3 < np.linalg.norm(wanted) < 0.8
    assert np.linalg.norm(by_hand(sgd(), start(learner, 1))["theta"]) > 0.8
    near(joined(learner.episode_gradient(episode()).grads), wanted)
    large = line(gradient=gradient, clip_between=1e3).episode_gradient(episode()).grads
    near(joined(large), by_hand(sgd(), start(learner, 1))["theta"])


def test_implicit_is_the_solution_of_the_linear_system() -> None:
    """phi* = (A + lambda)^-1 (b + lambda theta); the gradient is (I + A / lambda)^-1 Q'(phi*)."""
    inner = {"num_steps": 100, "lr": 0.3, "head_lr": None, "weight_decay": 0.1, "proximal": 0.5}
    learner = line(gradient="implicit", cg_steps=20, **inner)
    a, theta, (q, c) = A + 0.1 * EYE, start(learner), matrix("query")
    end = np.linalg.solve(a + 0.5 * EYE, B + 0.5 * theta)
    found = learner.episode_gradient(episode())
    near(joined(found.grads), np.linalg.solve(EYE + a / 0.5, q @ end - c))
    assert found.metrics["cg_residual"] < 1e-12
    curvature, values = found.metrics["cg_curvature"].item(), np.linalg.eigvalsh(EYE + a / 0.5)
    assert values[0] <= curvature * (1 + 1e-12) <= values[-1]
    few = line(gradient="implicit", cg_steps=2, **inner).episode_gradient(episode())
    left = q @ end - c - (EYE + a / 0.5) @ joined(few.grads)
    assert few.metrics["cg_residual"].item() == pytest.approx(np.linalg.norm(left), rel=1e-9)
    assert np.linalg.norm(left) > 1e-4


def test_reptile_is_the_way_over_the_rate() -> None:
    learner = line(gradient="reptile", head_lr=None)
    phi = theta = start(learner)
    for _ in range(STEPS):
        phi = phi - 0.1 * (A @ phi - B)
    near(joined(learner.episode_gradient(episode()).grads), (theta - phi) / 0.1)
