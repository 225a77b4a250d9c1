"""Norm policies, layer by layer, against formulas written down once more (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.layers import Pass, PassAware
from raymaml.models import build_model
from raymaml.models.norm import ContextNorm2d, TaskNorm2d
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


def test_context_gives_queries_the_moments_of_the_support_set_in_the_graph() -> None:
    made, support = layer("context"), SUPPORT.clone().requires_grad_()
    wanted = normalized(made, SUPPORT, *moments(SUPPORT))
    torch.testing.assert_close(run(made, "support", SUPPORT), wanted)
    torch.testing.assert_close(run(made, "context", support), wanted)
    out = run(made, "query", QUERY)
    torch.testing.assert_close(out, normalized(made, QUERY, *moments(SUPPORT)))
    (slope,) = torch.autograd.grad(out.pow(2).sum(), support)
    assert slope.abs().max() > 1e-2


def test_transductive_queries_use_their_own_batch() -> None:
    made = layer("transductive")
    run(made, "support", SUPPORT)
    torch.testing.assert_close(run(made, "query", QUERY), normalized(made, QUERY, *moments(QUERY)))


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


def apply(model: nn.Module, policy: str) -> nn.Module:
    apply_policies(model, {"*": policy}, eps=EPS, momentum=MOMENTUM)
    return model


def norms(**model: object) -> dict[str, str]:
    built = build_model(ModelConfig(width=2, **model), image_shape=(1, 16, 16), num_ways=3, seed=0)
    return {n: type(m).__name__ for n, m in built.named_modules() if isinstance(m, PassAware)}


def test_policies_go_to_layers_by_the_first_pattern_that_matches() -> None:
    found = norms(norm={"encoder.conv[13]": "episodic", "*.norm": "context"})
    assert found == {
        "encoder.conv1.norm": "EpisodicNorm2d",
        "encoder.conv2.norm": "ContextNorm2d",
        "encoder.conv3.norm": "EpisodicNorm2d",
        "encoder.conv4.norm": "ContextNorm2d",
    }
    assert set(norms(encoder="resnet12", norm="layer").values()) == {"LayerNorm2d"}


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        ({"encoder.conv5": "layer", "*": "none"}, "model.norm: 'encoder.conv5' matches nothing"),
        ({"encoder.conv1": "layer"}, r"encoder.conv2.norm, .* match none of the patterns"),
    ],
)
def test_a_pattern_that_fits_nothing_and_a_layer_that_fits_none_are_refused(
    norm: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        norms(norm=norm)


def test_the_weights_and_moments_of_a_pretrained_batch_norm_go_over() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C))
    with torch.no_grad():
        model[0].weight.fill_(3)
        model[0].running_var.fill_(5)
    state = apply(model, "running").state_dict()
    assert state["0.weight"].tolist() == [3, 3, 3]
    assert state["0.var"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("tracks", [True, False])
def test_a_batch_norm_in_a_plain_container_is_refused_before_anything_changes(tracks: bool) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=tracks))
    model.stages = [(model[0], model[1])]
    with pytest.raises(UserError, match=r"model\.encoder: stages\.0\.1 are norms in a plain attr"):
        apply(model, "transductive")
    assert type(model[1]) is nn.BatchNorm2d


def test_a_block_in_a_plain_list_takes_the_policy_of_its_norm() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(C)))
    model.blocks = [model[0]]
    apply(model, "context")
    assert isinstance(model.blocks[0][0], ContextNorm2d)


def test_a_norm_that_stands_at_two_places_is_one_layer_at_both() -> None:
    norm = nn.BatchNorm2d(C)
    model = apply(nn.Sequential(norm, nn.ReLU(), norm), "context")
    assert model[0] is model[2]
    assert isinstance(model[0], ContextNorm2d)


def test_a_policy_without_a_norm_to_replace_is_refused() -> None:
    with pytest.raises(UserError, match=r"no nn.BatchNorm2d .* set it to none"):
        apply(nn.Sequential(nn.GroupNorm(1, C)), "transductive")
    apply(nn.Sequential(nn.GroupNorm(1, C)), "none")


def test_another_layers_context_pass_adds_nothing_to_accumulated_moments() -> None:
    made = layer("episodic")
    run(made, "support", SUPPORT)
    mean, kept = made.mean, made.kept
    run(made, "context", SECOND)
    assert made.mean is mean
    assert made.kept is kept


class WithActivation(nn.BatchNorm2d):
    """As in many published encoders: the norm and what follows it in one layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class OfTheBase(nn.modules.batchnorm._BatchNorm):
    """A user's norm of its own dimensions."""


def with_hook() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(C)
    norm.register_forward_hook(lambda _norm, _inputs, out: torch.relu(out))
    return norm


def with_forward() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(C)
    norm.forward = torch.relu
    return norm


def with_gain() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(C)
    norm.gain = nn.Parameter(torch.ones(C))
    return norm


def parametrized() -> nn.BatchNorm2d:
    return nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", nn.ReLU())


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (WithActivation(C), "test_norm.WithActivation"),
        (with_hook(), "_forward_hooks"),
        (with_forward(), "forward"),
        (with_gain(), "gain"),
        (parametrized(), "ParametrizedBatchNorm2d"),
    ],
)
@pytest.mark.parametrize("policy", ["context", "none"])
def test_a_batch_norm_that_does_more_is_refused_by_name(
    norm: nn.Module, says: str, policy: str
) -> None:
    model = nn.Sequential(nn.Sequential(norm), nn.BatchNorm2d(C))
    with pytest.raises(UserError, match=rf"0\.0 is an nn\.BatchNorm2d that does more \(.*{says}\)"):
        apply(model, policy)
    assert model[0][0] is norm  # nothing is replaced


def test_a_plain_batch_norm_with_a_mark_of_its_user_is_no_more() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.rand(2, C, 4, 4))  # now it is an nn.BatchNorm2d
    model[0].note = "the first"
    assert isinstance(apply(model, "context")[0], ContextNorm2d)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(C),
        OfTheBase(C, 1e-5, 0.1, True, True),
        nn.SyncBatchNorm(C),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(C, track_running_stats=True),
    ],
)
def test_every_norm_that_keeps_moments_is_refused(norm: nn.Module) -> None:
    with pytest.raises(UserError, match=r"model\.encoder: 0 keep moments"):
        apply(nn.Sequential(norm), "context")


def test_norms_without_moments_stay_as_they_are() -> None:
    class Mine(nn.InstanceNorm2d):
        pass

    model = nn.Sequential(Mine(C), nn.GroupNorm(1, C), nn.BatchNorm2d(C))
    kept = list(model)[:2]
    assert list(apply(model, "context"))[:2] == kept


@pytest.mark.parametrize(
    ("norm", "learned"),
    [
        (nn.BatchNorm2d(C), ["weight", "bias"]),
        (nn.BatchNorm2d(C, affine=False), []),
        (nn.BatchNorm2d(C, bias=False), ["weight"]),
    ],
)
def test_a_batch_norm_without_scale_or_shift_stays_without(
    norm: nn.BatchNorm2d, learned: list[str]
) -> None:
    model = nn.Sequential(norm)
    before = model(SUPPORT.float())
    apply_policies(model, {"*": "transductive"}, eps=norm.eps, momentum=MOMENTUM)
    torch.testing.assert_close(model(SUPPORT.float()), before)
    assert [n for n, p in model[0].named_parameters() if p.requires_grad] == learned


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        ("context", r"model\.norm: 'context' is no mapping .* give \{'\*': 'context'\}"),
        (None, r"model\.norm: None is no mapping"),
        ({"*": "contxt"}, r"model\.norm: 'contxt' is no policy; .* did you mean context\?"),
        ({"*": 3}, r"model\.norm: 3 is no policy"),
    ],
)
def test_policies_that_are_none_are_refused(norm: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        apply_policies(nn.Sequential(nn.BatchNorm2d(C)), norm, eps=EPS, momentum=MOMENTUM)
