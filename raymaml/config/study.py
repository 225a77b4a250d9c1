"""A study: arms judged on the same episodes, and the claims that they decide."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from raymaml.common.untrusted import shortened
from raymaml.config.base import PathField, PositiveInt, Rate, Section, read_place
from raymaml.storage.place import Place

Overrides = dict[Annotated[str, Field(min_length=1)], Any]
"""Values by dotted config key."""
ShortName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$", max_length=100)]

Which = Literal["best", "last", "ensemble", "initial"]


def _checkpoint(value: object) -> object:
    return value if value in get_args(Which) else read_place(value)


MOST_SEEDS = 100


def _with_seeds(changes: dict[str, Any]) -> dict[str, Any]:
    if "seeds" in changes:
        if "seed" in changes:
            raise ValueError("models: a model has seed and seeds; give one of them")
        found = changes["seeds"]
        whole = isinstance(found, list) and all(type(seed) is int and seed >= 0 for seed in found)
        if not whole or not 1 <= len(found) <= MOST_SEEDS or len(set(found)) < len(found):
            raise ValueError(
                f"models: seeds is {shortened(found)}; it should be a list of 1 to {MOST_SEEDS}"
                " different whole numbers from 0 on, as in seeds: [0, 1, 2]"
            )
    return changes


ModelChanges = Annotated[Overrides, AfterValidator(_with_seeds)]
"""Values by dotted config key, and by `seeds`: one training for each."""

NOT_OF_AN_ARM = (
    *("name", "seed", "run_dir", "stage", "outer", "pretrain"),
    *("episodes.train", "episodes.val"),
)
"""Keys that decide training alone; they belong to a model."""
MOST_ARMS = 1_000
"""Maximum number of arms per study, each with every combination of `cross`."""


class StudyArm(Section):
    """One setting to judge."""

    name: ShortName
    """Name in tables, and of the folder of records."""
    model: str | None = None
    """One of `models`; null: the first."""
    checkpoint: Annotated[Place | Which, PlainValidator(_checkpoint)] = "best"
    """The weights: of the best validation accuracy, the newest, all best ones that the run has kept
    (the mean of their logits), those before training, or the folder of a checkpoint."""
    set: Overrides = Field(default_factory=dict)
    """Changes to the model's config, by dotted key: evaluation.inner.num_steps, model.norm,
    episodes.test.num_queries, ... Another `episodes.seed` draws other episodes."""


class _Claim(Section):
    claim: str
    """The claim, a sentence."""
    arm: str
    """The arm that it is about."""


class _Difference(_Claim):
    expect: Literal["more than", "less than", "within"]
    """more than margin; less than -margin; or between -margin and margin."""
    margin: Rate = 0.0
    """Accuracy, 0..1."""


class Comparison(_Difference):
    """A claim about the accuracy of ``arm`` minus that of another, episode by episode."""

    kind: Literal["difference"]
    minus: str
    """The other arm."""


class FirstTrials(_Difference):
    """A claim about the accuracy over the first trials of an arm minus that over all others."""

    kind: Literal["first trials"]
    count: PositiveInt = 600
    """Number of the first trials."""


class Precision(_Claim):
    """A claim that the half-width of an arm's 95% interval over `count` trials is more than
    margin: that number of trials is too small."""

    kind: Literal["precision"]
    expect: ClassVar[Literal["more than"]] = "more than"
    margin: Rate
    """Accuracy, 0..1."""
    count: PositiveInt = 600
    """Number of trials."""


Check = Annotated[Comparison | FirstTrials | Precision, Field(discriminator="kind")]


class StudyConfig(Section):
    """The keys of a study file."""

    name: ShortName
    """Name of the study, and of its folder in `<run_dir>/studies`."""
    title: str
    """Heading of the report."""
    config: PathField
    """The config that all arms start from; relative to the study file."""
    set: Overrides = Field(default_factory=dict)
    """Changes to it, for all models and arms."""
    models: dict[ShortName, ModelChanges] = Field(default_factory=dict)
    """Models to train, unless they are trained: changes by dotted key. A model without changes is
    the run of the config itself, and so is the one model of a study that gives none. Another model
    is the run `<name of the config>-<name of the model>`, or the one that its key `name` gives. The
    key `seeds` trains the model once per seed, as the runs `<name>-seed0`, `<name>-seed1`, ...: its
    arms are judged for each training on the same episodes, and verdicts rest on all of them."""
    arms: Annotated[tuple[StudyArm, ...], Field(min_length=1)] = (StudyArm(name="model"),)
    """The settings to judge."""
    cross: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Each arm is judged with every combination of these values, by dotted key."""
    checks: tuple[Check, ...] = ()
    """The claims, each with a verdict in the report."""

    @model_validator(mode="after")
    def _arms_can_be_counted(self) -> StudyConfig:
        count = len(self.arms) * math.prod(map(len, self.cross.values()))
        if count > MOST_ARMS:
            raise ValueError(
                f"cross: it makes {count:,} arms, and a study has {MOST_ARMS:,} at most; give fewer"
                " values, or fewer keys"
            )
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models; the first is the model of arms that name none."""
        return tuple(self.models) or ("model",)

    def seeds_of(self, model: str | None) -> tuple[int, ...]:
        """Return the seeds of the trainings of a model; none where the config gives the one."""
        return tuple(self.models.get(model or self.model_names[0], {}).get("seeds", ()))

    def trainings_of(self, arm: StudyArm) -> dict[int | None, StudyArm]:
        """Return ``arm`` for each training of its model, by seed; None is that of the config."""
        seeds = self.seeds_of(arm.model) if isinstance(arm.checkpoint, str) else ()
        if not seeds:
            return {None: arm}
        names = {seed: with_seed_in_name(arm.name, seed) for seed in seeds}
        return {seed: arm.model_copy(update={"name": name}) for seed, name in names.items()}

    def crossed_arms(self) -> Iterator[StudyArm]:
        """Yield every arm with every combination of `cross`: 3 x 2 values, six times the arms."""
        for arm in self.arms:
            yield from self.crossed(arm)

    def crossed(self, arm: StudyArm) -> Iterator[StudyArm]:
        """Yield ``arm`` with every combination of `cross`."""
        for values in itertools.product(*self.cross.values()):
            chosen = dict(zip(self.cross, values, strict=True))
            names = [f"{key.split('.')[-1]}={_slug(value)}" for key, value in chosen.items()]
            name = "-".join([arm.name, *names])
            yield arm.model_copy(update={"name": name, "set": {**arm.set, **chosen}})

    def disagreements(self) -> list[str]:
        """Return the mistakes between parts that are right by themselves: names, and places."""
        arms = [arm.name for arm in self.crossed_arms()]
        trained = Counter(
            each.name for arm in self.crossed_arms() for each in self.trainings_of(arm).values()
        )
        problems = [
            f"arms: {name} is the name of {count} arms; give each its own"
            for name, count in trained.items()
            if count > 1
        ]
        problems += [
            f"arms: {arm.name}: model is {shortened(arm.model)}; it must be one of"
            f" {', '.join(self.model_names)}"
            for arm in self.arms
            if arm.model not in (None, *self.model_names)
        ]
        changes = {f"arms: {arm.name}": arm.set for arm in self.arms} | {"cross": self.cross}
        problems += [
            f"{place}: {key} decides training; set it under `models`"
            for place, keys in changes.items()
            for key in keys
            if any(f"{key}.".startswith(f"{other}.") for other in NOT_OF_AN_ARM)
        ]
        problems += [
            f"checks: {shortened(check.claim)} names the arm {shortened(name)}; it must be one of"
            f" {', '.join(arms)}"
            for check in self.checks
            for name in (check.arm, *([check.minus] if isinstance(check, Comparison) else []))
            if name not in arms
        ]
        return problems


def with_seed_in_name(name: str, seed: int) -> str:
    """Return the name of one training of an arm, or of a run."""
    return f"{name}-seed{seed}"


def _slug(value: Any) -> str:
    """Return a value as a part of a name."""
    return re.sub(r"[^A-Za-z0-9._]+", "_", str(value)).strip("_") or "none"
