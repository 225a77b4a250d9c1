"""Encoders of timm and torchvision: features out, norms by policy, weights by seed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import raymaml
from raymaml.config.model import ModelConfig
from raymaml.layers import PassAware
from raymaml.models import build_model
from raymaml.models.heads import Classifier
from raymaml.models.libraries import NormAct, library_versions
from raymaml.models.source import encoder_source
from raymaml.training.agreement import check_gradient, made_up_episode

pytest.importorskip("timm", reason="no timm: pip install raymaml[timm]")

SMALL = {"inverted_residual_setting": [[1, 8, 1, 1], [2, 16, 1, 2]], "width_mult": 0.25}
NETWORKS = [  # features, and norms: a stem's and those of its blocks
    ("timm:test_resnet", {}, 1, 96),
    ("timm:test_efficientnet", {}, 1, 256),  # its norms activate as well
    ("torchvision:mobilenet_v2", SMALL, 3, 1280),
]


def built(
    encoder: str, args: Any = None, channels: int = 1, seed: int = 0, **more: Any
) -> Classifier:
    model = ModelConfig(encoder=encoder, encoder_args=args or {}, **more)
    return build_model(model, image_shape=(channels, 16, 16), num_ways=3, seed=seed)


def refused(encoder: str, args: Any = None, channels: int = 1, **more: Any) -> str:
    with pytest.raises(raymaml.UserError) as caught:
        built(encoder, args, channels, **more)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("encoder", "args", "channels", "features"), NETWORKS)
def test_a_network_gives_features_of_images_and_every_norm_has_the_policy(
    encoder: str, args: Any, channels: int, features: int
) -> None:
    model = built(encoder, args, channels, norm="episodic")
    assert model.encoder(torch.zeros(2, channels, 16, 16)).shape == (2, features)
    assert model.head.in_features == features
    assert any(isinstance(module, PassAware) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(("encoder", "args", "channels", "features"), NETWORKS)
@pytest.mark.parametrize("norm", ["transductive", "context"])
def test_the_meta_gradient_is_exact(
    encoder: str, args: Any, channels: int, features: int, norm: str
) -> None:
    learner = raymaml.MetaLearner(
        built(encoder, args, channels, norm=norm), raymaml.InnerConfig(num_steps=2, lr=0.01)
    )
    check_gradient(learner, made_up_episode((channels, 16, 16), 3, torch.device("cpu")))


def test_attention_of_timm_has_second_derivatives() -> None:
    args = {"img_size": 32, "depth": 1}
    model = ModelConfig(encoder="timm:test_vit", encoder_args=args, norm="none")
    network = build_model(model, image_shape=(3, 32, 32), num_ways=3, seed=0)
    learner = raymaml.MetaLearner(network, raymaml.InnerConfig(num_steps=2, lr=0.01))
    check_gradient(learner, made_up_episode((3, 32, 32), 3, torch.device("cpu")))


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = built("timm:test_resnet").state_dict()
    torch.manual_seed(2)
    again, other = (built("timm:test_resnet", seed=seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv1.0.weight"], other["encoder.conv1.0.weight"])


def test_a_norm_that_activates_computes_the_same_in_parts() -> None:
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(4, act_layer=nn.SiLU)
    with torch.no_grad():
        layer.weight.uniform_()
        layer.running_mean.uniform_()
    images = torch.randn(2, 4, 3, 3)
    parts = NormAct(layer)
    assert torch.equal(parts.eval()(images), layer.eval()(images))
    assert not torch.equal(parts(images), parts.norm(images))  # it activates


def test_a_name_that_a_library_lacks_is_answered_with_near_ones() -> None:
    assert "has no network tset_resnet; near are test_resnet" in refused("timm:tset_resnet")
    assert "near are resnet18" in refused("torchvision:resnet81", channels=3)
    assert refused("torchvision:fasterrcnn_resnet50_fpn", channels=3).startswith(
        "model.encoder: torchvision "  # a detector gives no features of an image
    )


def test_torchvision_takes_colour_alone_and_says_so() -> None:
    assert refused("torchvision:mobilenet_v2", SMALL) == (
        "model.encoder: torchvision:mobilenet_v2 takes images of 3 channels, these have 1; import"
        " them in colour (data.source.mode: rgb), or take the encoder from timm"
    )


def test_arguments_that_a_network_does_not_take_are_named() -> None:
    problem = refused("timm:test_resnet", {"colour": "red"})
    assert "timm:test_resnet cannot be built with model.encoder_args {'colour': 'red'}" in problem


def test_a_library_that_is_not_there_is_answered_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    problem = refused("timm:test_resnet")
    assert problem.startswith("model.encoder: timm cannot be imported")
    assert problem.endswith("; pip install raymaml[timm]")


def test_the_version_of_the_library_names_its_code() -> None:
    model = ModelConfig(encoder="timm:test_resnet")
    assert library_versions(model).keys() == {"timm"}
    assert library_versions(ModelConfig()) == {}
    assert encoder_source(model) is None


def test_names_of_encoders_and_norms() -> None:
    assert raymaml.list_encoders() == [
        *("convnet4", "convnet4_strided", "resnet10", "resnet12", "resnet18")
    ]
    assert "timm:test_resnet" in raymaml.list_encoders("timm")
    assert "torchvision:resnet18" in raymaml.list_encoders("torchvision")
    assert "torchvision:fasterrcnn_resnet50_fpn" not in raymaml.list_encoders("torchvision")
    with pytest.raises(raymaml.UserError, match="'keras' is none of timm, torchvision"):
        raymaml.list_encoders("keras")
    for norm in raymaml.list_norms():
        ModelConfig(norm=norm)


def test_an_encoder_alone() -> None:
    shape = (1, 16, 16)
    plain = raymaml.create_encoder("convnet4", image_shape=shape, width=2, seed=5)
    assert plain(torch.zeros(3, *shape)).shape == (3, plain.num_features) == (3, 2)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules()) == 4
    model = ModelConfig(width=2)
    whole = build_model(model, image_shape=shape, num_ways=3, seed=5)  # of the same seed
    assert torch.equal(plain.conv1.conv.weight, whole.encoder.conv1.conv.weight)
    policy = raymaml.create_encoder("convnet4", image_shape=shape, width=2, norm="context")
    assert sum(isinstance(module, PassAware) for module in policy.modules()) == 4
    with pytest.raises(raymaml.UserError, match="did you mean convnet4"):
        raymaml.create_encoder("convnet5")
    with pytest.raises(raymaml.UserError, match="create_encoder: has no option head"):
        raymaml.create_encoder("convnet4", head="zero")
