"""The sections `model` and `outer`: the learner, and its learning."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from raymaml.common.errors import did_you_mean
from raymaml.config.base import (
    Count,
    Momentum,
    PositiveInt,
    PositiveRate,
    Rate,
    Section,
)
from raymaml.config.norm import TRANSDUCTIVE, Norm, NormOptions, NormPolicy

Width = Annotated[PositiveInt, Field(le=65_536)]
FourWidths = tuple[Width, Width, Width, Width]
ENCODERS = {"convnet4": 4, "convnet4_strided": 0, "resnet12": 4, "resnet18": 0, "resnet10": 0}
"""The encoders of raymaml, and how often each halves an image by pooling."""
_OF_ONE_WIDTH = {"convnet4", "convnet4_strided"}
LIBRARIES = ("timm", "torchvision")
"""Libraries with encoders, as ``library:NAME``."""
PRETRAINED = "pretrained"
"""``model.weights`` for the weights that the encoder's library downloads."""
PRETRAIN = "pretrain"
"""``model.weights`` for those of the run of `raymaml pretrain`."""

_WEIGHTS = {"checkpoint_path", "pretrained", "weights"}
"""Arguments by which timm and torchvision take weights."""


class ModelConfig(Section):
    """Encoder, norm and head."""

    encoder: str = "convnet4"
    """convnet4; convnet4_strided (for Omniglot, as cbfinn/maml); resnet12; resnet18; resnet10 (one
    block per stage); timm:NAME; torchvision:NAME; or your own nn.Module as package.module:Name,
    which turns [B, C, H, W] into [B, features]."""
    encoder_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of your own encoder, or of the one of timm or torchvision."""
    weights: Annotated[str | None, Field(min_length=1)] = None
    """The weights that training starts from: a safetensors file; a torch state dict; a run folder
    of raymaml (its best checkpoint) or one checkpoint in it; `pretrain`: the run of `raymaml
    pretrain` of this config; or `pretrained`, which timm or torchvision downloads. null: random
    ones, by the seed."""
    width: Annotated[
        Annotated[Width | None, Tag("one width")] | Annotated[FourWidths, Tag("widths")],
        Discriminator(lambda value: "widths" if isinstance(value, list | tuple) else "one width"),
    ] = None
    """Channels of every convnet4 block (paper: 64 for Omniglot, 32 for mini-ImageNet), or of
    the four stages of a resnet, where one number w is (w, 2w, 4w, 8w). null: 32, for resnets 64."""
    norm: Norm = "transductive"
    """Norm policy: whose moments the query pass uses (table in raymaml/models/README.md). Or a
    policy with options: {policy: running, per_step: both, scale: true}. Or either by name pattern,
    the first match counts: {"encoder.conv[13]": running, "*": none}."""
    norm_momentum: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Weight of the newest batch in accumulated moments."""
    norm_eps: PositiveRate = 1e-5
    """Added to the variance."""
    head: Literal["learned", "zero", "shared", "prototypes"] = "learned"
    """Where the linear head starts in each episode: at meta-learned weights; at zero; at one
    meta-learned row repeated for every way; or at the class means c of the support features, as
    weights 2c and biases -|c|^2 (Proto-MAML, Triantafillou et al. 2020)."""
    temperature: PositiveRate = 1.0
    """The logits are multiplied by this number."""
    learn_temperature: bool = False
    """Meta-learn the temperature, starting at `temperature`; the inner loop does not adapt it."""

    @property
    def library(self) -> str | None:
        """The library that has the encoder, if one has."""
        library = self.encoder.partition(":")[0]
        return library if library in LIBRARIES else None

    @property
    def norm_by_pattern(self) -> dict[str, NormOptions]:
        """``norm`` as policies with options by name pattern."""
        norms = self.norm if isinstance(self.norm, dict) else {"*": self.norm}
        return {
            pattern: NormOptions(policy=norm) if isinstance(norm, str) else norm
            for pattern, norm in norms.items()
        }

    @property
    def norm_policies(self) -> set[NormPolicy]:
        """The policies in ``norm``."""
        return {norm.policy for norm in self.norm_by_pattern.values()}

    @property
    def norm_text(self) -> str:
        """``norm`` as results print it."""
        if not isinstance(self.norm, dict):
            return str(self.norm)
        return ", ".join(f"{pattern}: {norm}" for pattern, norm in self.norm.items())

    @property
    def is_transductive(self) -> bool:
        """Whether predictions depend on the other queries."""
        return not TRANSDUCTIVE.isdisjoint(self.norm_policies)

    @property
    def stage_widths(self) -> tuple[int, int, int, int]:
        """Channels of the four blocks or stages."""
        if isinstance(self.width, tuple):
            return self.width
        if self.encoder in _OF_ONE_WIDTH:
            width = 32 if self.width is None else self.width
            return width, width, width, width
        width = 64 if self.width is None else self.width
        return width, 2 * width, 4 * width, 8 * width

    @model_validator(mode="after")
    def _encoder_is_known(self) -> ModelConfig:
        own = self.encoder not in ENCODERS
        if own and not re.fullmatch(
            r"[A-Za-z_][\w.]*:[A-Za-z_]\w*" if self.library is None else r"\w+:\w[\w.-]*",
            self.encoder,
        ):
            raise ValueError(
                f"model.encoder is {self.encoder!r}; it must be one of {', '.join(ENCODERS)},"
                " timm:NAME, torchvision:NAME, or"
                f" package.module:Name{did_you_mean(self.encoder, ENCODERS)}"
            )
        if self.encoder_args and not own:
            raise ValueError(
                f"model.encoder_args: {self.encoder} takes none; leave them out: they belong to an"
                " encoder of your own, of timm or of torchvision"
            )
        if self.library and (named := sorted(_WEIGHTS & self.encoder_args.keys())):
            raise ValueError(
                f"model.encoder_args: {', '.join(named)} would be weights that the run does not"
                " know; give them as model.weights"
            )
        if own and self.width is not None:
            raise ValueError(f"model.width: {self.encoder} has none; use model.encoder_args")
        if self.weights == PRETRAINED and self.library is None:
            raise ValueError(
                f"model.weights is {PRETRAINED} but model.encoder is {self.encoder}: timm:NAME and"
                " torchvision:NAME have such weights; give a file or a run folder"
            )
        if self.encoder in _OF_ONE_WIDTH and isinstance(self.width, tuple):
            raise ValueError(
                f"model.width: {self.encoder} has blocks of one width; give one number"
            )
        return self


class OuterSteps(Section):
    """The update rule, its schedule, and the rhythm of a run, in outer steps."""

    section: ClassVar[str]
    """Key of the section in the configuration."""
    unit: ClassVar[str]
    """Name, in the plural, of the things that a step learns from."""
    num_steps: PositiveInt
    """Outer steps of the whole run."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    """Update rule."""
    lr: PositiveRate = 1e-3
    """Learning rate."""
    momentum: Momentum = 0.0
    """Momentum of sgd and rmsprop."""
    weight_decay: Rate = 0.0
    """Decay of the meta-parameters: added to the gradient (L2); apart from it for adamw.
    Learned rates and numbers of the inner rule do not decay."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """cosine: the rate falls to `final_lr` along a half cosine over the run; step: times `gamma` at
    each of `milestones`."""
    final_lr: Rate = 0.0
    """Learning rate at the end of the run (cosine); MAML++: 1e-5."""
    milestones: tuple[PositiveInt, ...] = ()
    """Outer steps at which the rate falls, ascending (step)."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of the rate at each milestone (step)."""
    warmup_steps: Count = 0
    """Number of outer steps over which the rate rises linearly, for every schedule."""
    clip_value: PositiveRate | None = None
    """Clip each entry of the meta-gradient to this absolute value; null does not clip."""
    clip_norm: PositiveRate | None = None
    """Scale the meta-gradient down to this Euclidean norm, after `clip_value`; null does not."""
    log_every: PositiveInt = 50
    """Outer steps between two lines of metrics and progress."""
    validate_every: PositiveInt = 500
    """Outer steps between two validations, each with a checkpoint."""
    checkpoint_every: PositiveInt | None = None
    """Outer steps between further checkpoints; null writes none between validations."""
    keep_best: PositiveInt = 1
    """Number of checkpoints, the best by validation accuracy, that a run keeps beside the last."""

    @model_validator(mode="after")
    def _options_belong_to_the_choices(self) -> OuterSteps:
        key, milestones, is_step = self.section, list(self.milestones), self.schedule == "step"
        own_momentum = self.optimizer in {"sgd", "rmsprop"}
        problems: dict[str, object] = {
            f"{key}.momentum is {self.momentum} but {key}.optimizer is {self.optimizer}:"
            " momentum belongs to sgd and rmsprop": self.momentum and not own_momentum,
            f"{key}.milestones is {milestones} but {key}.schedule is {self.schedule}: step"
            " needs milestones, and nothing else has them": bool(milestones) != is_step,
            f"{key}.gamma is {self.gamma} but {key}.schedule is {self.schedule}: gamma belongs"
            " to step": self.gamma != 0.1 and not is_step,
            f"{key}.final_lr is {self.final_lr} but {key}.schedule is {self.schedule}: final_lr"
            " belongs to cosine": self.final_lr and self.schedule != "cosine",
            f"{key}.final_lr is {self.final_lr}; it must be at most {key}.lr, {self.lr}": (
                self.final_lr > self.lr
            ),
            f"{key}.milestones is {milestones}; it must ascend": (
                milestones != sorted(set(milestones))
            ),
            f"{key}.milestones is {milestones}; they are outer steps below {key}.num_steps,"
            f" {self.num_steps}": milestones and milestones[-1] >= self.num_steps,
            f"{key}.warmup_steps is {self.warmup_steps}; it must be below {key}.num_steps,"
            f" {self.num_steps}": self.warmup_steps >= self.num_steps,
        }
        if found := [problem for problem, holds in problems.items() if holds]:
            raise ValueError("; ".join(found))
        return self


class OuterConfig(OuterSteps):
    """Learning of the meta-parameters (algorithm 1, line 8) and its rhythm, in outer steps."""

    section = "outer"
    unit = "episodes"
    meta_batch_size: Annotated[PositiveInt, Field(le=100_000)] = 4
    """Episodes per outer step, over all workers; at most 100,000."""
    rule_lr: PositiveRate | None = None
    """Learning rate of the rates and numbers that the inner rule learns (`inner.rates`,
    `inner.learned`); null is `lr`. It follows the schedule as well."""

    @property
    def rule_rate(self) -> float:
        """`rule_lr` as a multiple of `lr`."""
        return 1.0 if self.rule_lr is None else self.rule_lr / self.lr

    @property
    def per_step(self) -> int:
        """Episodes per outer step."""
        return self.meta_batch_size
