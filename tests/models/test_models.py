"""Models that are built: sizes, weights by seed; norms give way to policies or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.config.model import ModelConfig
from raymaml.layers import PassAware
from raymaml.models import build_model
from raymaml.models.heads import Classifier
from raymaml.models.norm import ContextNorm2d, RunningNorm2d
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


@pytest.mark.parametrize("tracks", [True, False])
def test_a_batch_norm_in_a_plain_container_is_refused_before_anything_changes(tracks: bool) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=tracks))
    model.stages = [(model[0], model[1])]
    with pytest.raises(UserError, match=r"model\.encoder: 0\.stages\.0\.1 are norms in a plain at"):
        apply("transductive", model)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_norm_is_replaced_at_all_its_places_with_its_weights_and_moments() -> None:
    norm = nn.BatchNorm2d(C)
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.running_var.fill_(5)
    block = nn.Sequential(norm)
    model = nn.Sequential(block, nn.ReLU(), norm)
    model.held = [block]  # a plain list
    apply_policies(model, {"*": "running"}, eps=1e-5, momentum=0.1)
    assert model.held[0][0] is block[0] is model[2]
    assert isinstance(model[2], RunningNorm2d)
    assert (model[2].weight.tolist(), model[2].var.tolist()) == ([3, 3, 3], [5, 5, 5])


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
        (WithActivation(C), "test_models.WithActivation"),
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


def test_norms_without_moments_stay_and_a_mark_on_a_batch_norm_is_allowed() -> None:
    lazy = nn.LazyBatchNorm2d()
    lazy(torch.rand(2, C, 4, 4))  # now it is an nn.BatchNorm2d
    lazy.note = "the first"
    kept = [nn.InstanceNorm2d(C), nn.GroupNorm(1, C)]
    *first, last = apply("context", *kept, lazy)
    assert first == kept
    assert isinstance(last, ContextNorm2d)


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
        ({"*": {"per_step": "affine"}}, r"model\.norm: policy is missing"),
        (
            {"*": {"policy": "context", "per_step": "both"}},
            r"per_step is both but .* context: only",
        ),
    ],
)
def test_policies_that_do_not_exist_are_refused(norm: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        apply(norm, nn.BatchNorm2d(C))


def test_a_policy_without_a_norm_to_replace_is_refused() -> None:
    with pytest.raises(UserError, match=r"no nn.BatchNorm2d .* set it to none"):
        apply("transductive", nn.GroupNorm(1, C))
    apply("none", nn.GroupNorm(1, C))


def build(size: int = 16, channels: int = 1, width: int = 4, seed: int = 0) -> Classifier:
    return build_model(
        ModelConfig(width=width), image_shape=(channels, size, size), num_ways=5, seed=seed
    )


def test_convnet4_64_for_omniglot_has_the_papers_112261_parameters() -> None:
    # conv 9*64 + 64, three of 9*64*64 + 64, four norms of 2*64, head 64*5 + 5
    total = sum(parameter.numel() for parameter in build(28, 1, 64).parameters())
    assert total == 640 + 3 * 36_928 + 4 * 128 + 325 == 112_261


@pytest.mark.parametrize(("size", "features"), [(16, 4), (28, 4), (32, 16), (84, 100), (31, 4)])
def test_four_poolings_halve_the_image_four_times(size: int, features: int) -> None:
    model = build(size, channels=3)  # width 4 x (size // 16)^2
    assert model.encoder(torch.zeros(2, 3, size, size)).shape == (2, features)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_weights_depend_on_the_seed_alone() -> None:
    one = build(seed=7).state_dict()
    torch.manual_seed(99)
    torch.randn(3)
    again, other = build(seed=7).state_dict(), build(seed=8).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["encoder.conv1.conv.weight"], other["encoder.conv1.conv.weight"])


def test_the_head_starts_small_and_biases_at_zero() -> None:
    weights = build(84, width=32).state_dict()
    # 5 x 800 draws of std 0.01: the sample deviation is within 5%
    assert weights["head.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    biases = [value for name, value in weights.items() if name.endswith("bias")]
    assert len(biases) == 9
    assert all(not value.any() for value in biases)


def test_the_strided_network_is_that_of_tensorflow_with_same_padding() -> None:
    config = ModelConfig(encoder="convnet4_strided", width=3, norm="instance")
    model = build_model(config, image_shape=(1, 28, 28), num_ways=5, seed=0).double()
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    x = images
    for block in model.encoder.children():
        # n gives ceil(n/2): 28, 14, 7, 4, 2; an odd number of zeros has one more at the end
        out = -(-x.shape[2] // 2)
        zeros = max((out - 1) * 2 + 3 - x.shape[2], 0)
        padded = torch.zeros(*x.shape[:2], x.shape[2] + zeros, x.shape[3] + zeros).double()
        first = zeros // 2
        padded[:, :, first : first + x.shape[2], first : first + x.shape[3]] = x
        x = torch.nn.functional.conv2d(padded, block.conv.weight, block.conv.bias, stride=2)
        assert x.shape[2:] == (out, out)
        x = torch.relu(torch.nn.functional.instance_norm(x))
    torch.testing.assert_close(model.encoder(images), x.mean((2, 3)))  # [2, 3]


def test_the_strided_network_for_omniglot_has_the_size_of_the_papers() -> None:
    config = ModelConfig(
        encoder="convnet4_strided", width=64, norm={"policy": "transductive", "scale": False}
    )
    model = build_model(config, image_shape=(1, 28, 28), num_ways=5, seed=0)
    # convolutions as of convnet4, four shifts of 64, head 64 * 5 + 5
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 640 + 3 * 36_928 + 4 * 64 + 325


def test_a_norm_that_is_off_has_rows_in_no_layer() -> None:
    norm = {"encoder.conv[12]": {"policy": "running", "per_step": "both"}, "*": "none"}
    config = ModelConfig(width=2, norm=norm)
    model = build_model(config, image_shape=(1, 16, 16), num_ways=3, seed=0, num_steps=4)
    rows = {n: len(v) for n, v in model.state_dict().items() if ".norm." in n}
    names = ("weight", "bias", "mean", "var")
    assert rows == {f"encoder.conv{i}.norm.{name}": 4 for i in (1, 2) for name in names}
