"""A study file, with the configs of all its models and arms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raymaml.common.errors import Mistakes, UserError, gathered
from raymaml.config.load import Changes, load_config, load_study, named_config
from raymaml.config.schema import Config
from raymaml.config.study import StudyArm, StudyConfig, with_seed_in_name
from raymaml.storage.place import Place


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """An arm of a study, with one training of its model."""

    of: str
    """The arm's name in the study."""
    chosen: StudyArm
    """Named so that no other training has the name."""
    model: Config
    """The config of the training."""
    config: Config
    """The config to judge by."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file with the configs that it makes."""

    settings: StudyConfig
    base: Config
    trainings: tuple[Config, ...]
    """The configs of all trainings of all models; equal runs may be there more than once."""
    arms: tuple[TrainedArm, ...]

    @property
    def folder(self) -> Place:
        """The folder of the report; episodes and records lie beside it, for all studies."""
        return self.base.run_dir / "studies" / self.base.name / self.settings.name


def read_study(
    path: Place, overrides: Sequence[str] = (), config_path: Place | None = None
) -> Study:
    """Read a study file and every config that it makes.

    Args:
        path: the study file.
        overrides: change the config of all models and arms, after the file's own ``set``.
        config_path: the config that all start from instead of the one that the file names.

    Raises:
        UserError: with every problem of any of them.
    """
    settings, problems = load_study(path)
    with gathered() as mistakes:
        mistakes.extend(problems)
        if config_path is None and settings.config == Path():
            raise UserError(*problems)  # one of them is that the file names no config
        place = named_config(path, settings.config) if config_path is None else config_path
        load = partial(_load, mistakes, place, Changes(f"{path}: set", settings.set), overrides)
        base = load()
        name = base[0].name if base else "study"
        changes = {model: _trainings(path, name, model, settings) for model in settings.model_names}
        models = {model: [load(each) for each in found] for model, found in changes.items()}
        arms: list[TrainedArm] = []
        for own in settings.arms:
            changed = Changes(f"{path}: arms: {own.name}", own.set)
            for arm in settings.crossed(own):
                crossed = Changes(f"{path}: cross", {key: arm.set[key] for key in settings.cross})
                model = arm.model or settings.model_names[0]
                if model not in models:  # one of the problems; what else is wrong is reported too
                    load(changed, crossed)
                    continue
                for at, chosen in enumerate(settings.trainings_of(arm).values()):
                    judged = load(changes[model][at], changed, crossed)
                    arms += [
                        TrainedArm(of=arm.name, chosen=chosen, model=trained, config=config)
                        for trained, config in zip(models[model][at], judged, strict=False)
                    ]
        trainings = {model: [*itertools.chain(*found)] for model, found in models.items()}
        _note_runs_of_two_models(path, trainings, mistakes)
        _note_ensembles_of_one(path, arms, mistakes)
    flat = tuple(itertools.chain(*trainings.values()))
    return Study(settings=settings, base=base[0], trainings=flat, arms=tuple(arms))


def _load(mistakes: Mistakes, place: Place, *layers: Sequence[str] | Changes) -> list[Config]:
    """Return a config; an empty list, and its mistakes noted, where there are any."""
    found: list[Config] = []
    with mistakes.kept():
        found.append(load_config(place, *layers))
    return found


def _trainings(path: Place, base: str, model: str, settings: StudyConfig) -> list[Changes]:
    """Return the changes that make a model of the base config, for each of its trainings."""
    seeds, changes = settings.seeds_of(model), dict(settings.models.get(model, {}))
    changes.pop("seeds", None)
    named = {"name": f"{base}-{model}", **changes} if changes else {}
    name = named.get("name", base)
    trainings = [{**named, "name": with_seed_in_name(name, seed), "seed": seed} for seed in seeds]
    return [Changes(f"{path}: models: {model}", each) for each in trainings or [named]]


def _note_ensembles_of_one(path: Place, arms: Sequence[TrainedArm], mistakes: Mistakes) -> None:
    for arm in arms:
        if arm.chosen.checkpoint == "ensemble" and arm.model.outer.keep_best == 1:
            mistakes.add(
                f"{path}: arms: {arm.chosen.name}: checkpoint is ensemble but outer.keep_best is 1:"
                " its model keeps one best checkpoint",
                remedy="set outer.keep_best: 5 under `models`, or under `set` for all of them",
            )


def _note_runs_of_two_models(
    path: Place, trainings: dict[str, list[Config]], mistakes: Mistakes
) -> None:
    """Note models that learn differently, and would be one run."""
    runs: dict[str, Config] = {}
    for model, config in ((model, each) for model, found in trainings.items() for each in found):
        other = runs.setdefault(config.name, config)
        same = config.learning == other.learning
        if not same or config.outer.num_steps != other.outer.num_steps:
            mistakes.add(
                f"{path}: models: {model}: is the run {config.name}, as is a model that learns"
                " otherwise",
                remedy="give one of them another name",
            )
