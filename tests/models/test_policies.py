"""Norms of a model give way to policies, or are refused by name (float32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.layers import PassAware
from raymaml.models import build_model
from raymaml.models.norm import ContextNorm2d
from raymaml.models.policies import apply_policies

C = 3


def apply(policy: Any, *layers: nn.Module, eps: float = 1e-5) -> nn.Sequential:
    model = nn.Sequential(*layers)
    norm = {"*": policy} if isinstance(policy, str) else policy
    apply_policies(model, norm, eps=eps, momentum=0.1)
    return model


def norms(**model: object) -> dict[str, str]:
    built = build_model(ModelConfig(width=2, **model), image_shape=(1, 16, 16), num_ways=3, seed=0)
    return {n: type(m).__name__ for n, m in built.named_modules() if isinstance(m, PassAware)}


def test_policies_go_to_layers_by_the_first_pattern_that_matches() -> None:
    assert norms(norm={"encoder.conv[13]": "episodic", "*.norm": "context"}) == {
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
def test_a_pattern_without_a_layer_and_a_layer_without_a_pattern_are_refused(
    norm: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        norms(norm=norm)


def test_the_weights_and_moments_of_a_pretrained_batch_norm_go_over() -> None:
    norm = nn.BatchNorm2d(C)
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.running_var.fill_(5)
    state = apply("running", norm).state_dict()
    assert state["0.weight"].tolist() == [3, 3, 3]
    assert state["0.var"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("tracks", [True, False])
def test_a_batch_norm_in_a_plain_container_is_refused_before_anything_changes(tracks: bool) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=tracks))
    model.stages = [(model[0], model[1])]
    with pytest.raises(UserError, match=r"model\.encoder: 0\.stages\.0\.1 are norms in a plain at"):
        apply("transductive", model)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_block_in_a_plain_list_takes_the_policy_of_its_norm() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(C)))
    model.blocks = [model[0]]
    apply("context", model)
    assert isinstance(model.blocks[0][0], ContextNorm2d)


def test_a_norm_that_stands_at_two_places_is_one_layer_at_both() -> None:
    norm = nn.BatchNorm2d(C)
    model = apply("context", norm, nn.ReLU(), norm)
    assert model[0] is model[2]
    assert isinstance(model[0], ContextNorm2d)


class WithActivation(nn.BatchNorm2d):
    """As in many published encoders: the norm and what follows it in one layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def with_hook() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(C)
    norm.register_forward_hook(lambda _norm, _inputs, out: torch.relu(out))
    return norm


def having(name: str, value: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(C)
    setattr(norm, name, value)
    return norm


def parametrized() -> nn.Module:
    return nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", nn.ReLU())


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (WithActivation(C), "test_policies.WithActivation"),
        (with_hook(), "_forward_hooks"),
        (having("forward", torch.relu), "forward"),
        (having("gain", nn.Parameter(torch.ones(C))), "gain"),
        (parametrized(), "ParametrizedBatchNorm2d"),
    ],
)
@pytest.mark.parametrize("policy", ["context", "none"])
def test_a_batch_norm_that_does_more_is_refused_by_name(
    norm: nn.Module, says: str, policy: str
) -> None:
    block = nn.Sequential(norm)
    with pytest.raises(UserError, match=rf"0\.0 is an nn\.BatchNorm2d that does more \(.*{says}\)"):
        apply(policy, block, nn.BatchNorm2d(C))
    assert block[0] is norm  # nothing is replaced


class OfTheBase(nn.modules.batchnorm._BatchNorm):
    """A norm of a user's own."""


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
def test_every_other_norm_that_keeps_moments_is_refused(norm: nn.Module) -> None:
    with pytest.raises(UserError, match=r"model\.encoder: 0 keep moments from episode to episode"):
        apply("context", norm)


def test_norms_without_moments_stay_as_they_are() -> None:
    class Mine(nn.InstanceNorm2d):
        pass

    kept = [Mine(C), nn.GroupNorm(1, C)]
    assert list(apply("context", *kept, nn.BatchNorm2d(C)))[:2] == kept


def test_a_plain_batch_norm_with_a_mark_of_its_user_is_no_more() -> None:
    lazy = nn.LazyBatchNorm2d()
    lazy(torch.rand(2, C, 4, 4))  # now it is an nn.BatchNorm2d
    lazy.note = "the first"
    assert isinstance(apply("context", lazy)[0], ContextNorm2d)


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
    images = torch.randn(6, C, 4, 5, generator=torch.Generator().manual_seed(0))
    before = norm(images)
    model = apply("transductive", norm, eps=norm.eps)
    torch.testing.assert_close(model(images), before)
    assert [n for n, p in model[0].named_parameters() if p.requires_grad] == learned


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (None, r"model\.norm: None is no mapping .* give \{'\*': None\}"),
        ({"*": "contxt"}, r"model\.norm: 'contxt' is no policy; .* did you mean context\?"),
        ({"*": 3}, r"model\.norm: 3 is no policy"),
    ],
)
def test_policies_that_do_not_exist_are_refused(norm: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        apply(norm, nn.BatchNorm2d(C))


def test_a_policy_without_a_norm_to_replace_is_refused() -> None:
    with pytest.raises(UserError, match=r"no nn.BatchNorm2d .* set it to none"):
        apply("transductive", nn.GroupNorm(1, C))
    apply("none", nn.GroupNorm(1, C))
