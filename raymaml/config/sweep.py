"""A sweep file: a space over dotted keys, the choice of its trials, and their early end."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raymaml.config.base import Count, Number, PathField, PositiveInt, PositiveRate, Section
from raymaml.config.study import Overrides, ShortName

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
FORMS = ("choice", "grid", "uniform", "log_uniform", "integer")

MAX_TRIALS = 10_000
WholeNumber = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
"""A whole number that a float holds exactly."""

SHARED: tuple[str, ...] = (
    *("name", "seed", "run_dir", "episodes", "cluster"),
    *("data.source", "data.bank", "data.shards", "data.image_size", "data.materialize"),
    *("outer.log_every", "outer.validate_every", "outer.checkpoint_every"),
)
"""Keys that all trials share, so that the same episodes judge them at the same steps."""


class Dimension(Section):
    """The values of one key: exactly one of these forms."""

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
                f"space: {given[0]} is {list(self.bounds)}; the first must be below the second"
            )
        return self


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020), by Ray Tune: a trial ends at a rung unless
    it is among the best 1/`reduction_factor` of the trials that have reached the rung so far."""

    kind: Literal["asha"]
    grace_steps: PositiveInt | None = None
    """Outer step of the first rung; each further one is `reduction_factor` times as far. null:
    outer.validate_every."""
    reduction_factor: Annotated[int, Field(ge=2, strict=True)] = 2
    """One in this many trials goes on past a rung."""


class NoScheduler(Section):
    """Every trial takes all its outer steps."""

    kind: Literal["none"]


def _by_name(value: object) -> object:
    tree = {"kind": value} if isinstance(value, str) else value
    if isinstance(tree, dict) and tree.get("kind") == "pbt":
        raise ValueError(
            "scheduler is pbt: raymaml has no population-based training any more; use asha or none"
        )
    return tree


Scheduler = Annotated[
    Annotated[Asha | NoScheduler, Field(discriminator="kind")], BeforeValidator(_by_name)
]


class SweepConfig(Section):
    """All keys of a sweep file."""

    name: ShortName
    """Name of the sweep, and of its folder in `<run_dir>/sweeps/<name of the config>`."""
    title: str
    """Heading of the report."""
    config: PathField
    """The config that all trials start from; relative to the sweep file."""
    set: Overrides = Field(default_factory=dict)
    """Changes to it, for all trials."""
    space: Annotated[dict[Annotated[str, Field(min_length=1)], Dimension], Field(min_length=1)]
    """The keys that differ between trials, by dotted key."""
    search: Literal["random", "optuna"] = "random"
    """random: trial i is a function of `seed` and i, so that more trials later leave the earlier
    ones as they are. optuna: Optuna proposes each trial, given the best accuracies of others."""
    num_trials: PositiveInt | None = None
    """Number of trials, at most 10,000; null: every combination of the grids once."""
    seed: Count = 0
    """Seed of the values. (The config has the seeds of weights and episodes, for all trials.)"""
    metric: Literal["val_accuracy"] = "val_accuracy"
    """The number compared: the accuracy on the validation episodes, larger is better."""
    scheduler: Scheduler = Asha(kind="asha")
    """asha or none, or asha with its options: {kind: asha, ...}."""
    workers_per_trial: PositiveInt = 1
    """Training workers of each trial. 1: the trial's own process learns; more: Ray Train's."""
    max_concurrent_trials: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of trials at once; auto: as many as the cluster has room for."""

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.grid_size if self.num_trials is None else self.num_trials

    @property
    def grid_size(self) -> int:
        """Number of combinations of the grids."""
        return math.prod(len(each.grid) for each in self.space.values() if each.grid is not None)

    @model_validator(mode="after")
    def _makes_sense(self) -> SweepConfig:
        problems = [
            f"space: {key} cannot differ between trials, which are compared on the same episodes"
            " at the same steps; give it under `set`"
            for key in self.space
            if any(f"{key}.".startswith(f"{s}.") or s.startswith(f"{key}.") for s in SHARED)
        ]
        has_grid = any(each.grid is not None for each in self.space.values())
        if self.search == "optuna" and has_grid:
            problems.append("space: optuna searches no grid; use choice, or search: random")
        if self.num_trials is None and not has_grid:
            problems.append("num_trials is missing; only a space with a grid has a number itself")
        if self.count > MAX_TRIALS:
            problems.append(f"these are more than {MAX_TRIALS:,} trials; give fewer num_trials")
        if problems:
            raise ValueError("; ".join(problems))
        return self
