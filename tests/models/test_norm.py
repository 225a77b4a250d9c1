"""Norm policies, layer by layer, against formulas written down once more (float64)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raymaml.layers import Pass, PassAware
from raymaml.models.norm import ScaledNorm2d, TaskNorm2d
from raymaml.models.policies import POLICIES, apply_policies

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


def shaped(by_channel: Tensor) -> Tensor:
    return by_channel.view(1, C, 1, 1)


def normalized(made: PassAware, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / torch.sqrt(var + EPS) * shaped(made.weight) + shaped(made.bias)


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


def with_options(**options: object) -> ScaledNorm2d:
    """Three inner steps; rows of scale and shift, where there are any, are 1, 2 and 3 away."""
    given = nn.BatchNorm2d(C)
    with torch.no_grad():
        given.weight.copy_(torch.tensor([1.5, 0.5, -1.0]))
        given.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    model = nn.Sequential(given)
    apply_policies(model, {"*": options}, eps=EPS, momentum=MOMENTUM, num_steps=3)
    made = model.double()[0]
    assert isinstance(made, ScaledNorm2d)
    for parameter in made.parameters():
        if parameter.dim() == 2:
            assert (parameter == parameter[0]).all()  # a row of the layer's own, repeated
            parameter.data += torch.arange(3)[:, None]
    return made


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_each_step_has_its_scale_and_shift_and_later_ones_take_the_last(policy: str) -> None:
    by_step, plain = with_options(policy=policy, per_step="affine"), with_options(policy=policy)
    assert by_step.weight is not None
    assert by_step.weight.shape == by_step.bias.shape == (3, C)
    for step, row in enumerate([0, 1, 2, 2, 2]):
        by_step.inner_step = step
        plain.weight = nn.Parameter(by_step.weight[row].detach())
        plain.bias = nn.Parameter(by_step.bias[row].detach())
        for current, x in (("support", SUPPORT), ("context", SUPPORT), ("query", QUERY)):
            for rules in ("torch", "composed", "closed"):
                by_step.rules = plain.rules = rules
                torch.testing.assert_close(run(by_step, current, x), run(plain, current, x))
    assert (by_step.weight[0] == torch.tensor([1.5, 0.5, -1.0])).all()


@pytest.mark.parametrize("per_step", ["running", "both"])
def test_each_step_moves_and_reads_its_own_running_moments(per_step: str) -> None:
    made = with_options(policy="running", per_step=per_step)
    assert made.mean.shape == made.var.shape == (3, C)
    start = torch.tensor([0.1, 0.2, 0.3]).double()
    for step, batch in enumerate([SUPPORT, SECOND]):
        made.inner_step = step
        run(made, "support", batch)
    (m1, v1), (m2, v2) = (
        [m.flatten() for m in moments(x, correction=1)] for x in (SUPPORT, SECOND)
    )
    means = torch.stack([0.8 * start + 0.2 * m1, 0.8 * start + 0.2 * m2, start])
    torch.testing.assert_close(made.mean, means)
    torch.testing.assert_close(made.var, torch.stack([0.8 + 0.2 * v1, 0.8 + 0.2 * v2, 1 + 0 * v1]))
    torch.testing.assert_close(made.kept, torch.tensor([[0.8], [0.8], [1.0]]).double())
    made.eval()
    for step, row in enumerate([0, 1, 2, 2]):
        made.inner_step = step
        weight, bias = (p[row] if per_step == "both" else p for p in (made.weight, made.bias))
        wanted = (QUERY - shaped(made.mean[row])) / torch.sqrt(shaped(made.var[row]) + EPS)
        wanted = wanted * shaped(weight) + shaped(bias)
        torch.testing.assert_close(run(made, "query", QUERY), wanted)
        torch.testing.assert_close(run(made, "support", QUERY), wanted)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_without_a_scale_there_is_the_shift_alone(policy: str) -> None:
    made, plain = with_options(policy=policy, scale=False), with_options(policy=policy)
    assert "weight" not in {name for name, _ in made.named_parameters()}
    plain.weight = nn.Parameter(torch.ones(C).double())
    for layer in (made, plain):
        layer.bias.data.copy_(torch.tensor([0.5, 1.0, -2.0]))
    for current, x in (("support", SUPPORT), ("context", SUPPORT), ("query", QUERY)):
        for rules in ("torch", "composed", "closed"):
            made.rules = plain.rules = rules
            torch.testing.assert_close(run(made, current, x), run(plain, current, x))
