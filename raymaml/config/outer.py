"""The section `outer`: learning of the meta-parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymaml.config.base import Count, Momentum, PositiveInt, PositiveRate, Rate, Section


class OuterConfig(Section):
    """Learning of the meta-parameters (algorithm 1, line 8) and its rhythm, in outer steps."""

    num_steps: PositiveInt
    """Outer steps of the whole run."""
    meta_batch_size: Annotated[PositiveInt, Field(le=100_000)] = 4
    """Episodes per outer step, over all workers; at most 100,000."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    """Update rule."""
    lr: PositiveRate = 1e-3
    """Learning rate."""
    momentum: Momentum = 0.0
    """Momentum of sgd and rmsprop."""
    weight_decay: Rate = 0.0
    """Decay of the meta-parameters: added to the gradient (L2); apart from it for adamw."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """cosine: the rate falls to 0 along a half cosine over the run; step: times `gamma` at each of
    `milestones`."""
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

    @model_validator(mode="after")
    def _options_belong_to_the_choices(self) -> OuterConfig:
        milestones, is_step = list(self.milestones), self.schedule == "step"
        own_momentum = self.optimizer in {"sgd", "rmsprop"}
        problems: dict[str, object] = {
            f"outer.momentum is {self.momentum} but outer.optimizer is {self.optimizer}:"
            " momentum belongs to sgd and rmsprop": self.momentum and not own_momentum,
            f"outer.milestones is {milestones} but outer.schedule is {self.schedule}: step"
            " needs milestones, and nothing else has them": bool(milestones) != is_step,
            f"outer.gamma is {self.gamma} but outer.schedule is {self.schedule}: gamma belongs"
            " to step": self.gamma != 0.1 and not is_step,
            f"outer.milestones is {milestones}; it must ascend": (
                milestones != sorted(set(milestones))
            ),
            f"outer.milestones is {milestones}; they are outer steps below outer.num_steps,"
            f" {self.num_steps}": milestones and milestones[-1] >= self.num_steps,
            f"outer.warmup_steps is {self.warmup_steps}; it must be below outer.num_steps,"
            f" {self.num_steps}": self.warmup_steps >= self.num_steps,
        }
        if found := [problem for problem, holds in problems.items() if holds]:
            raise ValueError("; ".join(found))
        return self
