"""The section `inner`: adaptation to one episode, and the way to its meta-gradient."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymaml.common.errors import did_you_mean
from raymaml.config.base import Momentum, Number, PositiveInt, PositiveRate, Rate, Section, Steps

RULE_ARGS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "rmsprop": ("beta", "epsilon"),
    "adam": ("beta1", "beta2", "epsilon"),
    "alfa": ("decay",),
}
"""The rules of raymaml, and the names of their numbers; a test compares them with the rules."""
LEARNS = {"alfa"}
"""Rules with tensors that the outer loop learns in any case."""
BY_THE_END = {"reptile", "implicit"}
"""Methods that look at the adapted weights alone, and not at the way there."""
OVER_THE_RATE = {"reptile"}
"""Those of them that divide by the rate; they learn only parameters that adapt."""
PULLED = {"implicit"}
"""Those of them that pull adaptation toward theta."""
KEEPS_STATES = {"auto", "checkpointed", "mixed_mode"}
"""Methods that may keep the weights before inner steps."""


class MultiStepLoss(Section):
    """The multi-step loss of MAML++ (Antoniou et al. 2019, section 4): query losses after every
    inner step, whose weights move to the last step in stages."""

    num_outer_steps: PositiveInt
    """Outer steps over which it applies; then the loss is that after the last inner step."""
    num_stages: PositiveInt = 10
    """Stages of equal length; the weights are constant in each. MAML++ calls a stage an epoch."""

    @model_validator(mode="after")
    def _a_stage_has_a_step(self) -> MultiStepLoss:
        if self.num_stages > self.num_outer_steps:
            raise ValueError(
                f"inner.multi_step_loss.num_stages is {self.num_stages}; it must be at most"
                f" num_outer_steps, {self.num_outer_steps}"
            )
        return self


class InnerConfig(Section):
    """Adaptation to one episode (Finn et al. 2017, algorithm 1, lines 5 and 6)."""

    num_steps: Steps = 5
    """Number of inner steps (T), at most 100,000; 0 judges the meta-parameters as they are."""
    rule: str = "sgd"
    """Update rule of the inner steps: sgd; rmsprop; adam; alfa (Baik et al. 2020); or your own
    raymaml.Rule as package.module:Name."""
    rule_args: dict[str, Number] = Field(default_factory=dict)
    """Numbers of the rule: rmsprop has beta and epsilon; adam beta1, beta2 and epsilon; alfa decay,
    the weight decay that it starts from."""
    lr: Rate = 0.01
    """Learning rate of the encoder on the mean cross-entropy of the support set."""
    head_lr: Rate | None = None
    """Learning rate of the head; null is the encoder's."""
    rates: Literal["fixed", "shared", "per_tensor", "per_tensor_per_step", "per_parameter"] = (
        "fixed"
    )
    """Whether the outer loop learns the rates, starting at `lr` and `head_lr`. shared: one number;
    per_tensor; per_tensor_per_step (LSLR of MAML++); per_parameter (Meta-SGD)."""
    lr_range: tuple[Number, Number] | None = None
    """Learned rates start uniform in [low, high], by the seed; null: at `lr` and `head_lr`."""
    learned: tuple[str, ...] = ()
    """Numbers of the rule that the outer loop learns: momentum, or names of `rule_args`."""
    momentum: Momentum = 0.0
    """Momentum of sgd; each episode starts at rest."""
    weight_decay: Rate = 0.0
    """Added to the gradient, times the weight (L2)."""
    frozen: tuple[str, ...] = ()
    """Name patterns of parameters that the inner loop leaves alone and the outer loop learns:
    encoder.conv1, *.norm, head, encoder.layer[12]."""
    support_batch_size: PositiveInt | None = None
    """Support images of each inner step, in shuffled passes over the support set; null: all."""
    gradient: Literal[
        "auto", "unrolled", "checkpointed", "mixed_mode", "first_order", "reptile", "implicit"
    ] = "auto"
    """unrolled: exact second-order meta-gradient by the plain graph; checkpointed: the same with
    the memory of one inner step, by computing each step twice; mixed_mode: the same with that
    memory and in less time, by Hessian-vector products; first_order: FOMAML; reptile: from theta to
    the adapted weights (Nichol et al. 2018); implicit: iMAML (Rajeswaran et al. 2019). auto: the
    exact method that was measured to be best for such a model (raymaml/meta/README.md)."""
    keep_every: Annotated[Steps, Field(ge=1)] = 1
    """checkpointed, mixed_mode: keep the weights before every k-th inner step, and run those in
    between once more. Less memory for many steps of a large model."""
    tape_memory: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """mixed_mode, in closed form: MiB of activations that a process keeps for the way back; it
    computes those of further inner steps once more, to the same bits. auto: its share, by core, of
    a quarter of free memory, or half of that of its GPU. 0 keeps the memory of one inner step."""
    clip_between: PositiveRate | None = None
    """Scale the derivatives that go back from each inner step down to this Euclidean norm; null
    does not. The meta-gradient is no longer exact."""
    first_order_steps: Steps = 0
    """Outer steps at the start that take the meta-gradient first_order (MAML++)."""
    multi_step_loss: MultiStepLoss | None = None
    """Query losses after every inner step; null: after the last alone."""
    proximal: PositiveRate | None = None
    """implicit: pull of the inner loop toward theta (lambda)."""
    cg_steps: Annotated[Steps, Field(ge=1)] = 5
    """implicit: maximum number of conjugate gradient steps."""

    @property
    def learns(self) -> bool:
        """Whether the outer loop learns rates, numbers or tensors of the rule."""
        return self.rates != "fixed" or bool(self.learned) or self.rule in LEARNS

    def of_records(self) -> str:
        """Return the keys as JSON that decide a record of evaluation; a later key that has its
        default is left out, so that records of before it keep their name."""
        first = {"num_steps", "lr", "head_lr", "momentum", "weight_decay", "frozen", "gradient"}
        return self.model_dump_json(include=(first | {*self.changed}) - {"tape_memory"})

    @model_validator(mode="after")
    def _rule_fits(self) -> InnerConfig:
        own = self.rule not in RULE_ARGS
        if own and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.rule):
            raise ValueError(
                f"inner.rule is {self.rule!r}; it must be one of {', '.join(RULE_ARGS)}, or"
                f" package.module:Name{did_you_mean(self.rule, RULE_ARGS)}"
            )
        takes = RULE_ARGS.get(self.rule, ())
        numbers = takes or ("momentum",)  # of sgd
        args = {} if own else self.rule_args  # an own rule knows its numbers when it is built
        strange = [] if own else sorted(set(self.learned) - set(numbers))
        problems: dict[str, object] = {
            f"inner.rule_args: {self.rule} has"
            f" {', '.join(takes) or 'none; its number is inner.momentum'}; remove"
            f" {', '.join(sorted(set(args) - set(takes)))}": set(args) - set(takes),
            f"inner.learned: {self.rule} has {', '.join(numbers)}, and not"
            f" {', '.join(strange)}": strange,
            f"inner.momentum is {self.momentum} but inner.rule is {self.rule}: momentum belongs to"
            " sgd": self.momentum and self.rule != "sgd",
            f"inner.lr_range is {list(self.lr_range or ())} but inner.rates is fixed: it is for"
            " learned rates; set inner.rates, such as per_parameter": self.lr_range
            and self.rates == "fixed",
            f"inner.lr_range is {list(self.lr_range or ())}; it must ascend": self.lr_range
            and self.lr_range[0] >= self.lr_range[1],
        }
        for name, value in args.items():
            least = f"inner.rule_args.{name} is {value}; it must be"
            problems[f"{least} from 0 to below 1"] = name[:4] == "beta" and not 0 <= value < 1
            problems[f"{least} above 0"] = name == "epsilon" and value <= 0
        if found := [problem for problem, holds in problems.items() if holds]:
            raise ValueError("; ".join(found))
        return self

    def gradient_at(self, outer_step: int | None) -> str:
        """Return the method of an outer step; None stands for one after all changes."""
        early = outer_step is not None and outer_step < self.first_order_steps
        return "first_order" if early else self.gradient

    @model_validator(mode="after")
    def _method_fits(self) -> InnerConfig:
        method = self.gradient
        by_end = f"inner.gradient is {method}, which looks at the adapted weights alone"
        ends = method in BY_THE_END
        problems: dict[str, object] = {
            f"{by_end}, so that no rate or number of the rule can be learned: set inner.rates:"
            " fixed, and no inner.learned, or take another method": ends and self.learns,
            f"{by_end}: inner.multi_step_loss needs a method that follows every step": ends
            and self.multi_step_loss,
            f"{by_end}: inner.clip_between has nothing to clip": ends and self.clip_between,
            f"{by_end}: inner.first_order_steps must be 0": ends and self.first_order_steps,
            f"inner.gradient is {method}, which needs inner.proximal: set it, such as 10.0": (
                method in PULLED and self.proximal is None
            ),
            f"inner.proximal is {self.proximal} but inner.gradient is {method}: it belongs to"
            " implicit": self.proximal is not None and method not in PULLED,
            f"inner.cg_steps is {self.cg_steps} but inner.gradient is {method}: it belongs to"
            " implicit": "cg_steps" in self.changed and method not in PULLED,
            "inner.gradient is reptile: inner.lr must be above 0, since the meta-gradient is"
            " (theta - adapted) / lr": method in OVER_THE_RATE and self.lr == 0,
            f"inner.gradient is {method}, which learns from the way to the adapted weights, but"
            " inner.num_steps is 0": method in OVER_THE_RATE and self.num_steps == 0,
            f"inner.keep_every is {self.keep_every} but inner.gradient is {method}: it is for"
            " checkpointed and mixed_mode": self.keep_every > 1 and method not in KEEPS_STATES,
        }
        if found := [problem for problem, holds in problems.items() if holds]:
            raise ValueError("; ".join(found))
        return self


class InnerOverride(Section):
    """Changes to `inner` at validation and test; null keeps the value used in training."""

    num_steps: Steps | None = None
    """Inner steps at validation and test."""
    lr: Rate | None = None
    """Encoder rate at validation and test."""
    head_lr: Rate | None = None
    """Head rate at validation and test."""
    momentum: Momentum | None = None
    """Momentum at validation and test."""
    weight_decay: Rate | None = None
    """Weight decay at validation and test."""
    frozen: tuple[str, ...] | None = None
    """Frozen parameters at validation and test."""
    support_batch_size: PositiveInt | None = None
    """Support images of each inner step at validation and test."""

    def apply(self, inner: InnerConfig) -> InnerConfig:
        """Return ``inner`` with the values that are set here."""
        return inner.model_copy(update=self.model_dump(exclude_none=True))
