"""A sweep: configs that are drawn from a space over dotted keys, and the rule that stops some."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raymaml.config.base import Number, PathField, PositiveInt, PositiveRate, Section
from raymaml.config.study import Overrides, ShortName

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
FORMS = ("choice", "grid", "uniform", "log_uniform", "integer")

MOST_TRIALS = 10_000
WholeNumber = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
"""What a float holds exactly, as the drawing of a number needs it."""

NOT_DRAWN: tuple[str, ...] = (
    *("name", "seed", "run_dir", "episodes", "cluster"),
    *("data.source", "data.bank", "data.shards", "data.image_size", "data.materialize"),
    *("outer.log_every", "outer.validate_every", "outer.checkpoint_every"),
)
"""What all trials must share: the same episodes, judged at the same steps."""
PERTURBED: tuple[str, ...] = (
    *("inner", "evaluation.inner", "data.augment.train"),
    *("outer.lr", "outer.gamma", "outer.clip_value", "outer.clip_norm"),
)
"""What may change under weights that were learned with another value. Not what belongs to the
model, to the position in the data, or to the state of the optimizer, which a checkpoint carries."""


class Dimension(Section):
    """Where the values of one key come from: exactly one of these."""

    choice: Values | None = None
    """One of these values, each as likely."""
    grid: Values | None = None
    """Each of these values in turn; several grids are crossed."""
    uniform: tuple[Number, Number] | None = None
    """A number between the two."""
    log_uniform: tuple[PositiveRate, PositiveRate] | None = None
    """A number between the two, whose logarithm is uniform."""
    integer: tuple[WholeNumber, WholeNumber] | None = None
    """A whole number from the first to the second, both included."""

    @property
    def form(self) -> str:
        """Which of the forms it has."""
        return next(name for name in FORMS if getattr(self, name) is not None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest number; None for a list of values."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a choice or a grid."""
        return self.choice or self.grid or ()

    @model_validator(mode="after")
    def _one_form(self) -> Dimension:
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"space: a key has one of {', '.join(FORMS)}, as in"
                f" {{log_uniform: [1e-3, 1e-1]}}; {' and '.join(given) or 'none'} is given"
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(
                f"space: {self.form} is {list(self.bounds)}; the first must be below the second"
            )
        return self


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020), by Ray Tune: of the trials that have come
    as far as a rung, one that is not among the best 1/`reduction_factor` so far ends there."""

    kind: Literal["asha"]
    grace_steps: PositiveInt | None = None
    """Outer step of the first rung; each further one is `reduction_factor` times as far. null:
    outer.validate_every."""
    reduction_factor: Annotated[int, Field(ge=2, strict=True)] = 2
    """The share of trials that goes on past a rung is one in so many."""


class Pbt(Section):
    """Population-based training (Jaderberg et al. 2017), all trials step by step: the worst go on
    from the weights of the best, with that one's settings, perturbed."""

    kind: Literal["pbt"]
    perturb_every: PositiveInt
    """Outer steps between two comparisons of all trials."""
    quantile: Annotated[Number, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials that is replaced, by as many of the best."""
    resample_probability: Annotated[Number, Field(ge=0, le=1)] = 0.25
    """How often a perturbed value is drawn from the space anew; else it is..."""
    factors: tuple[PositiveRate, PositiveRate] = (0.8, 1.25)
    """...multiplied by one of these, within the space; a choice moves to a neighbour in its list,
    and a whole number by at least 1."""


class Unsupervised(Section):
    """Every trial takes all its outer steps."""

    kind: Literal["none"]


SCHEDULERS = ("asha", "pbt", "none")


def _by_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


Scheduler = Annotated[
    Annotated[Asha | Pbt | Unsupervised, Field(discriminator="kind")], BeforeValidator(_by_name)
]


class SweepConfig(Section):
    """Everything that a sweep file says."""

    name: ShortName
    """Name of the sweep, and of its folder in `<run_dir>/sweeps/<name of the config>`."""
    title: str
    """Heading of the report."""
    config: PathField
    """The config that all trials start from; relative to the sweep file."""
    set: Overrides = Field(default_factory=dict)
    """Changes to it, for all trials."""
    space: Annotated[dict[Annotated[str, Field(min_length=1)], Dimension], Field(min_length=1)]
    """What differs from trial to trial, by dotted key. Trial i is a function of `seed` and i: more
    trials later leave the earlier ones as they are."""
    num_trials: PositiveInt | None = None
    """Trials, 10,000 at most; null: every combination of the grids once."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seed of the drawn values. (The seeds of weights and episodes are the config's, for all.)"""
    metric: Literal["val_accuracy"] = "val_accuracy"
    """What is compared: the accuracy on the validation episodes, larger is better."""
    scheduler: Scheduler = Asha(kind="asha")
    """asha, pbt or none, or one of them with its options: {kind: asha, ...}."""
    workers_per_trial: PositiveInt = 1
    """Training workers of each trial. 1: the trial's own process learns; more: Ray Train's."""
    max_concurrent_trials: PositiveInt | Literal["auto"] = "auto"
    """Trials at once, at most; auto: as many as the cluster has room for."""

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.grid_size if self.num_trials is None else self.num_trials

    @property
    def grid_size(self) -> int:
        """Number of combinations of the grids."""
        return math.prod(len(each.grid) for each in self.space.values() if each.grid is not None)

    @property
    def perturbed(self) -> list[str]:
        """Keys that population-based training changes under learned weights."""
        return [key for key in self.space if is_in(key, PERTURBED)]

    @model_validator(mode="after")
    def _makes_sense(self) -> SweepConfig:
        problems = [
            f"space: {key} cannot differ between trials, which are compared on the same episodes"
            " at the same steps; give it under `set`"
            for key in self.space
            if is_in(key, NOT_DRAWN) or any(is_in(other, (key,)) for other in NOT_DRAWN)
        ]
        if self.num_trials is None and not any(each.grid for each in self.space.values()):
            problems.append("num_trials is missing; only a space with a grid has a number itself")
        if self.count > MOST_TRIALS:
            problems.append(f"these are more than {MOST_TRIALS:,} trials; give fewer num_trials")
        elif isinstance(self.scheduler, Pbt):
            problems += self._problems_of_a_population(self.scheduler)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_a_population(self, pbt: Pbt) -> list[str]:
        problems = []
        if int(self.count * pbt.quantile) < 1:
            problems.append(
                f"scheduler.quantile is {pbt.quantile}: of {self.count} trials that is none; give"
                " more of either"
            )
        if "outer.num_steps" in self.space:
            problems.append("space: outer.num_steps must be equal for all trials of pbt")
        if not self.perturbed:
            problems.append(
                f"space: pbt perturbs {', '.join(PERTURBED)}; none of its keys is there"
            )
        return problems


def is_in(key: str, sections: tuple[str, ...]) -> bool:
    """Tell whether a dotted key is one of ``sections`` or lies in one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)
