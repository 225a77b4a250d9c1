"""Norm policies, layer by layer, against formulas written down once more (float64)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raymaml.layers import Pass, PassAware
from raymaml.models.norm import TaskNorm2d
from raymaml.models.policies import POLICIES

C, EPS, MOMENTUM = 3, 1e-3, 0.2


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None, None]
    noise = torch.randn(count, C, 4, 5, generator=generator, dtype=torch.float64)
    return noise * spread + spread


SUPPORT, SECOND, QUERY = images(6, 0), images(6, 1), images(4, 2)


def layer(policy: str) -> PassAware:
    made = POLICIES[policy](C, EPS, MOMENTUM).double()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            if parameter.dim():
                parameter.copy_(torch.tensor([1.5, 0.5, -1.0]) + number)
    return made


def run(made: PassAware, current: Pass, x: Tensor) -> Tensor:
    made.current_pass = current
    out: Tensor = made(x)
    return out


def moments(x: Tensor, dims: tuple[int, ...] = (0, 2, 3), correction: int = 0) -> list[Tensor]:
    return [x.mean(dims, keepdim=True), x.var(dims, correction=correction, keepdim=True)]


def normalized(made: PassAware, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    weight, bias = (p.view(1, C, 1, 1) for p in (made.weight, made.bias))
    return (x - mean) / torch.sqrt(var + EPS) * weight + bias


def mixed(x: Tensor, mean: Tensor, var: Tensor, alpha: float, own: tuple[int, ...]) -> list[Tensor]:
    """Mean and variance of a mixture with weights alpha and 1 - alpha (law of total variance)."""
    own_mean, own_var = moments(x, own)
    center = alpha * mean + (1 - alpha) * own_mean
    context, rest = var + (mean - center) ** 2, own_var + (own_mean - center) ** 2
    return [center, alpha * context + (1 - alpha) * rest]


@pytest.mark.parametrize(
    "policy", ["transductive", "running", "episodic", "episodic_biased", "tasknorm_reference"]
)
def test_the_support_pass_of_training_uses_its_batch(policy: str) -> None:
    made = layer(policy)
    wanted = normalized(made, SUPPORT, *moments(SUPPORT))
    torch.testing.assert_close(run(made, "support", SUPPORT), wanted)
    if policy == "transductive":  # queries as well
        wanted = normalized(made, QUERY, *moments(QUERY))
        torch.testing.assert_close(run(made, "query", QUERY), wanted)


def test_context_gives_queries_the_moments_of_the_support_set_in_the_graph() -> None:
    made, support = layer("context"), SUPPORT.clone().requires_grad_()
    wanted = normalized(made, SUPPORT, *moments(SUPPORT))
    torch.testing.assert_close(run(made, "support", SUPPORT), wanted)
    torch.testing.assert_close(run(made, "context", support), wanted)
    out = run(made, "query", QUERY)
    torch.testing.assert_close(out, normalized(made, QUERY, *moments(SUPPORT)))
    (slope,) = torch.autograd.grad(out.pow(2).sum(), support)
    assert slope.abs().max() > 1e-2


def test_episodic_moments_forget_where_they_started() -> None:
    made, biased = layer("episodic"), layer("episodic_biased")
    for batch in (SUPPORT, SECOND):
        run(made, "support", batch)
        run(biased, "support", batch)
    (m1, v1), (m2, v2) = moments(SUPPORT, correction=1), moments(SECOND, correction=1)
    # momentum 0.2: weights 0.8 * 0.2 and 0.2; 0.64 is left for the start, mean 0 and variance 1
    mean, var = 0.16 * m1 + 0.2 * m2, 0.16 * v1 + 0.2 * v2
    torch.testing.assert_close(
        run(biased, "query", QUERY), normalized(biased, QUERY, mean, var + 0.64)
    )
    torch.testing.assert_close(
        run(made, "query", QUERY), normalized(made, QUERY, mean / 0.36, var / 0.36)
    )


def test_running_moments_rule_everything_but_the_support_pass_of_training() -> None:
    made = layer("running")
    run(made, "support", SUPPORT)
    mean, var = moments(SUPPORT, correction=1)
    wanted = normalized(made, QUERY, 0.2 * mean, 0.8 + 0.2 * var)
    torch.testing.assert_close(run(made, "query", QUERY), wanted)
    made.eval()
    torch.testing.assert_close(run(made, "support", QUERY), wanted)
    torch.testing.assert_close(run(made, "query", QUERY), wanted)  # and nothing has moved


@pytest.mark.parametrize(("policy", "own"), [("tasknorm_i", (2, 3)), ("tasknorm_l", (1, 2, 3))])
def test_tasknorm_pools_context_and_own_moments_in_both_passes(
    policy: str, own: tuple[int, ...]
) -> None:
    made = layer(policy)
    with torch.no_grad():
        made.get_parameter("alpha_scale").fill_(0.25)
        made.get_parameter("alpha_offset").fill_(-1.0)
    alpha = 1 / (1 + 2.718281828459045 ** -(0.25 * 6 - 1.0))  # six support images
    context = moments(SUPPORT)
    wanted = normalized(made, SUPPORT, *mixed(SUPPORT, *context, alpha, own))
    torch.testing.assert_close(run(made, "support", SUPPORT), wanted)
    torch.testing.assert_close(run(made, "context", SUPPORT), wanted)
    wanted = normalized(made, QUERY, *mixed(QUERY, *context, alpha, own))
    torch.testing.assert_close(run(made, "query", QUERY), wanted)


def test_the_references_tasknorm_mixes_accumulated_moments_into_queries_alone() -> None:
    made = layer("tasknorm_reference")
    run(made, "support", SUPPORT)
    mean, var = moments(SUPPORT, correction=1)
    wanted = normalized(made, QUERY, *mixed(QUERY, 0.2 * mean, 0.8 + 0.2 * var, 0.5, (2, 3)))
    torch.testing.assert_close(run(made, "query", QUERY), wanted)


@pytest.mark.parametrize(("offset", "policy"), [(50.0, "context"), (-800.0, "instance")])
def test_tasknorm_is_context_at_alpha_1_and_instance_at_alpha_0(offset: float, policy: str) -> None:
    made, other = layer("tasknorm_i"), layer(policy)
    assert isinstance(made, TaskNorm2d)
    with torch.no_grad():
        made.alpha_offset.fill_(offset)
        other.weight.copy_(made.weight)
        other.bias.copy_(made.bias)
    for current, x in (("support", SUPPORT), ("context", SUPPORT), ("query", QUERY)):
        torch.testing.assert_close(run(made, current, x), run(other, current, x))


def test_instance_and_layer_take_each_image_by_itself_and_none_does_nothing() -> None:
    for policy, dims in (("instance", (2, 3)), ("layer", (1, 2, 3))):
        made = layer(policy)
        wanted = normalized(made, QUERY, *moments(QUERY, dims))
        torch.testing.assert_close(run(made, "query", QUERY), wanted)
        torch.testing.assert_close(run(made, "query", QUERY[:1]), wanted[:1])
    assert run(layer("none"), "query", QUERY) is QUERY


def test_another_layers_context_pass_adds_nothing_to_accumulated_moments() -> None:
    made = layer("episodic")
    run(made, "support", SUPPORT)
    mean, kept = made.mean, made.kept
    run(made, "context", SECOND)
    assert made.mean is mean
    assert made.kept is kept
