"""fmu2/PyTorch-MAML ("the reference"): its keys, the values that we can convert, and its names.

A key without a value stands for the reference's default, except for a ``momentum``, where it stands
for a plain average. Keys that begin with ``_`` are those of a running process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from raymaml.common.errors import UserError
from raymaml.config.base import Augmentation, Momentum, Number, PositiveRate, Rate, Section
from raymaml.meta.learner import MetaLearner
from raymaml.models.encoders import ConvNet4, ResNet12, ResNet18

Size = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]
Ways = Annotated[int, Field(ge=2, le=10_000, strict=True)]
Dataset = Literal[
    "meta-mini-imagenet",
    "meta-tiered-imagenet",
    "meta-cifar-fs",
    "meta-fc100",
    "meta-cub200",
    "meta-inatural",
]
Encoder = Literal[
    "convnet4", "wide-convnet4", "resnet12", "wide-resnet12", "resnet18", "wide-resnet18"
]
_LAYERS = {f"layer{i}": f"encoder.layer{i}" for i in range(1, 5)}
BLOCKS = {
    "convnet4": {f"conv{i}": f"encoder.conv{i}" for i in range(1, 5)},
    "resnet12": _LAYERS,
    "resnet18": {"layer0": "encoder.stem"} | _LAYERS,
}
"""The blocks whose norms the reference can make episodic, and our names for them."""
_RULES = (
    (r"^encoder\.stem\.", "encoder.layer0."),
    (r"^(encoder\.layer\d)\.0\.", r"\1."),
    (r"\.shortcut\.", ".res_conv."),
    (r"^(encoder\.layer\d)\.conv(\d)\.conv\.", r"\1.conv\2."),
    (r"^(encoder\.layer\d)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^encoder\.conv(\d)\.", r"encoder.encoder.conv\1."),
    (r"\.norm\.", ".bn."),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
    (r"^head\.", "classifier.linear."),
    (r"^temperature$", "classifier.temp"),
)
"""From our names of parameters and buffers to the reference's."""


class _Part(Section):
    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return {} if tree is None else tree
        return {
            key: value
            for key, value in tree.items()
            if (value is not None or key == "momentum") and not str(key).startswith("_")
        }


class Norms(_Part):
    """Batch norm."""

    track_running_stats: bool = True
    episodic: tuple[str, ...] = ()
    n_episode: Any = None
    alpha: bool = False
    momentum: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    eps: PositiveRate = 1e-5
    affine: Literal[True] = True


class EncoderArguments(_Part):
    """Arguments of the encoder."""

    bn_args: Norms = Norms()


class HeadArguments(_Part):
    """Arguments of the linear head."""

    n_way: Annotated[Size, Field(le=10_000)] | None = None
    in_dim: Any = None
    temp: PositiveRate = 1.0
    learn_temp: bool = False


class InnerArguments(_Part):
    """The inner loop."""

    reset_classifier: bool = False
    n_step: Annotated[int, Field(ge=0, le=100_000)] = 5
    encoder_lr: Rate = 0.01
    classifier_lr: Rate = 0.01
    momentum: Momentum = 0.0
    weight_decay: Rate = 0.0
    first_order: bool = False
    frozen: tuple[str, ...] = ()


class Data(_Part):
    """The images and episodes of one split."""

    root_path: str | None = None
    split: str | None = None
    image_size: Annotated[int, Field(ge=8, le=1024, strict=True)] = 84
    normalization: bool = True
    transform: Augmentation = "none"
    val_transform: Augmentation = "none"
    n_batch: Size = 200
    n_episode: Size = 4
    n_way: Ways = 5
    n_shot: Size = 1
    n_query: Size = 15


class OptimizerArguments(_Part):
    """The outer loop's update rule and schedule."""

    lr: PositiveRate
    weight_decay: Rate = 0.0
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Size, ...] = ()
    gamma: Annotated[Number, Field(gt=0, lt=1)] = 0.1


class Model(_Part):
    """The model, which checkpoints describe as well."""

    encoder: Encoder
    encoder_args: EncoderArguments = EncoderArguments()
    classifier: Literal["logistic"] = "logistic"
    classifier_args: HeadArguments = HeadArguments()

    @property
    def blocks(self) -> dict[str, str]:
        """The entry of ``BLOCKS`` for the encoder."""
        return BLOCKS[self.encoder.removeprefix("wide-")]

    @model_validator(mode="after")
    def _policies_exist(self) -> Model:
        norms, blocks = self.encoder_args.bn_args, self.blocks
        if strange := [block for block in norms.episodic if block not in blocks]:
            raise ValueError(
                f"encoder_args.bn_args.episodic: the encoder has no {', '.join(strange)[:200]}; it"
                f" has {', '.join(blocks)}"
            )
        if norms.alpha and norms.track_running_stats and set(norms.episodic) != set(blocks):
            raise ValueError(
                "encoder_args.bn_args.alpha: has no counterpart without episodic statistics in"
                " every block"
            )
        return self


class Training(Model):
    """A training configuration."""

    dataset: Dataset
    train: Data
    val: Data | None = None
    load: str | None = None
    inner_args: InnerArguments = InnerArguments()
    optimizer: Literal["adam", "sgd", "rmsprop"]
    optimizer_args: OptimizerArguments
    epoch: Size

    @model_validator(mode="after")
    def _cosine_spans_the_run(self) -> Training:
        milestones = self.optimizer_args.milestones
        if self.optimizer_args.schedule == "cosine" and milestones[-1:] not in ((), (self.epoch,)):
            raise ValueError(
                f"optimizer_args.milestones: the reference's cosine ends after {milestones[-1]}"
                f" epochs of {self.epoch}; ours spans the run"
            )
        return self


class Testing(_Part):
    """A test configuration, which names no model."""

    dataset: Dataset
    test: Data
    load: str | None = None
    inner_args: InnerArguments = InnerArguments()
    epoch: Size


def kind_of(tree: Mapping[str, Any]) -> type[Training] | type[Testing]:
    """Return which of the two kinds of configuration ``tree`` is."""
    return Testing if "test" in tree and "train" not in tree else Training


def reference_names(learner: MetaLearner) -> dict[str, str]:
    """Return the reference's name of each parameter of the learner's model.

    Raises:
        UserError: the reference has no such encoder.
    """
    return their_names(learner.model, dict(learner.model.named_parameters()))


def their_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the reference's name of each of these parameters and buffers of ``model``.

    Raises:
        UserError: the reference has no such encoder.
    """
    encoder = model.get_submodule("encoder")
    is_resnet18 = isinstance(encoder, ResNet18) and len(list(encoder.layer1.children())) > 1
    is_strided = isinstance(encoder, ConvNet4) and encoder.strided
    if is_resnet18 or is_strided or not isinstance(encoder, ConvNet4 | ResNet12 | ResNet18):
        raise UserError(
            f"the reference has no counterpart of the encoder {type(encoder).__name__}",
            remedy="it has convnet4, resnet12 and resnet10 (which it calls resnet18)",
        )
    return {name: _translated(name) for name in names}


def _translated(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
