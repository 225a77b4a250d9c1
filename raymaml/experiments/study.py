"""A study: models that are trained where they are not yet, arms that are judged, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from raymaml.common.errors import UserError, gathered
from raymaml.common.logs import plain
from raymaml.config.load import Changes, load_config, load_study, named_config
from raymaml.config.schema import SPLITS, Config, learning_fingerprint
from raymaml.config.study import StudyArm, StudyConfig, Which, with_seed_in_name
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import HEADER_FILE
from raymaml.data.episodes import check_spec, write_shards
from raymaml.data.importers import import_bank
from raymaml.data.shard_format import MANIFEST_FILE
from raymaml.evaluation.arm import Resolver, Setting
from raymaml.evaluation.campaign import Campaign, Echo, Plan
from raymaml.evaluation.provenance import REMEDY, require_bank
from raymaml.evaluation.records import record_arrays
from raymaml.experiments.verdicts import reach_verdicts
from raymaml.seeding import fold_in
from raymaml.storage.files import exists
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import open_bank, sample_shards
from raymaml.training.run_folder import is_done
from raymaml.training.state import build_learner, require_fitting
from raymaml.training.trust import require_of_its_run, require_of_today, require_trained_by

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """An arm of a study, with one training of its model."""

    of: str
    """The arm's name in the study."""
    chosen: StudyArm
    """Named so that no other training has the name."""
    model: Config
    """What is trained."""
    config: Config
    """As it is judged."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file with the configs that it makes."""

    settings: StudyConfig
    base: Config
    models: dict[str, tuple[Config, ...]]
    """What is trained, by name of the model: a config for each training."""
    arms: tuple[TrainedArm, ...]

    @property
    def folder(self) -> Place:
        """Where the report is written; episodes and records lie beside it, for all studies."""
        return self.base.run_dir / "studies" / self.base.name / self.settings.name


def read_study(
    path: Place, overrides: Sequence[str] = (), config_path: Place | None = None
) -> Study:
    """Read a study file and every config that it makes.

    Args:
        path: the study file.
        overrides: change the config of all models and arms, after the file's own ``set``.
        config_path: what all start from instead of the config that the file names.

    Raises:
        UserError: with every problem of any of them.
    """
    settings, problems = load_study(path)
    if config_path is None and settings.config == Path():  # the file names none, as is said above
        raise UserError(*problems)
    place = named_config(path, settings.config) if config_path is None else config_path

    def config(*layers: Changes) -> Config | None:
        try:
            return load_config(place, Changes(f"{path}: set", settings.set), overrides, *layers)
        except UserError as error:
            problems.extend(error.problems)
            return None

    base = config()
    name = "study" if base is None else base.name
    layers = {model: _of_model(path, name, model, settings) for model in settings.model_names}
    models = {model: [config(layer) for layer in each] for model, each in layers.items()}
    arms = []
    for own in settings.arms:
        changed = Changes(f"{path}: arms: {own.name}", own.set)
        for arm in settings.crossed(own):
            crossed = Changes(f"{path}: cross", {key: arm.set[key] for key in settings.cross})
            model = arm.model or settings.model_names[0]
            trainings = settings.trainings_of(arm).values()
            if model not in layers:  # as is said above; what else is wrong is said as well
                config(changed, crossed)
                continue
            for at, chosen in enumerate(trainings):
                trained, judged = models[model][at], config(layers[model][at], changed, crossed)
                if trained is not None and judged is not None:
                    arms.append(
                        TrainedArm(of=arm.name, chosen=chosen, model=trained, config=judged)
                    )
    understood = {
        model: tuple(made for made in each if made is not None) for model, each in models.items()
    }
    of_run: dict[str, Config] = {}
    for model, made in ((model, made) for model, each in understood.items() for made in each):
        if not _learn_alike(made, of_run.setdefault(made.name, made)):
            problems.append(
                f"{path}: models: {model}: is the run {made.name}, as is a model that learns"
                " otherwise; give one of them another name"
            )
    if base is None or problems:
        raise UserError(*dict.fromkeys(problems))  # a mistake of a model is one of its arms too
    return Study(settings=settings, base=base, models=understood, arms=tuple(arms))


def _learn_alike(one: Config, other: Config) -> bool:
    same = learning_fingerprint(one) == learning_fingerprint(other)
    return same and one.outer.num_steps == other.outer.num_steps


def _of_model(path: Place, base: str, model: str, settings: StudyConfig) -> list[Changes]:
    """Return the changes that make a model of the base config, for each of its trainings."""
    seeds, changes = settings.seeds_of(model), dict(settings.models.get(model, {}))
    changes.pop("seeds", None)
    named = {"name": f"{base}-{model}", **changes} if changes else {}
    name = named.get("name", base)
    trainings = [{**named, "name": with_seed_in_name(name, seed), "seed": seed} for seed in seeds]
    return [Changes(f"{path}: models: {model}", each) for each in trainings or [named]]


def run_study(
    study: Study,
    *,
    train: Callable[[Config, Echo], bool],
    judge: Callable[..., Campaign],
    echo: Echo,
) -> Place | None:
    """Import, sample and train what is missing, judge what is missing, and write the report.

    Returns:
        The path of ``summary.json``; None where training was interrupted.

    Raises:
        UserError: what any of these steps finds wrong; of arms, before any training.
    """
    trainings = (config for each in study.models.values() for config in each)
    configs = {config.name: config for config in trainings}.values()
    untrained = [config for config in configs if not _is_trained(config)]
    for config in untrained:
        provide_data(config, echo)
    if untrained:
        _of_each(study.arms, lambda arm: arm.chosen.name, _require_judgeable)
    for config in untrained:
        if not train(config, echo):
            return None
    plan: Plan = partial(plan_study, study)
    return write_study_report(study, judge(plan, study.base.cluster, echo))


def _is_trained(config: Config) -> bool:
    """Tell whether the run is done.

    Raises:
        UserError: it is of another config, or an earlier raymaml started it.
    """
    require_of_today(config.run_folder, config.outer.num_steps, though_done=True)
    if not is_done(config):
        return False
    require_trained_by(config)
    return True


def provide_data(config: Config, echo: Echo) -> None:
    """Make bank and shards, where they are not there; what is there is left to be checked."""
    if not exists(config.data.bank / HEADER_FILE):
        bank = import_bank(config.data, config.episodes, lambda note: echo(plain(note)))
        echo(plain(f"{bank.folder}: {bank.num_images} images of {bank.source}"))
    manifests = (config.data.shards / split / MANIFEST_FILE for split in SPLITS[:2])
    if not all(exists(manifest) for manifest in manifests):
        for shards in sample_shards(config.data, config.episodes, open_bank(config.data)):
            echo(f"{shards.folder}: {shards.count} episodes")


def plan_study(study: Study, device: torch.device) -> Campaign:
    """Plan the campaign of a study: sample its test episodes, and check every arm.

    Raises:
        UserError: naming all that is wrong with any arm.
    """
    resolve = Resolver(device)
    arms = _of_each(
        study.arms, lambda arm: arm.chosen.name, lambda arm: resolve(_setting(study, arm))
    )
    _of_each(arms, lambda arm: arm.name, lambda arm: arm.build())
    return Campaign(
        name=f"{study.base.name}/{study.settings.name}",
        folder=study.folder,
        records=study.folder.parent / "records",
        arms=tuple(arms),
        chunk_size=study.base.evaluation.chunk_size,
    )


def _of_each(
    arms: Iterable[Item], name: Callable[[Item], str], do: Callable[[Item], Found]
) -> list[Found]:
    """Return what ``do`` gives for each arm.

    Raises:
        UserError: with the problems of all arms, each with the name of its arm.
    """
    found: list[Found] = []
    with gathered() as mistakes:
        for arm in arms:
            with mistakes.kept(name(arm)):
                found.append(do(arm))
    return found


def _require_judgeable(arm: TrainedArm) -> None:
    """Check what can be known of an arm before its model is trained.

    Raises:
        UserError: its episodes, its model or its weights would be refused later.
    """
    chosen, config, source = arm.chosen, arm.config, arm.model
    if not isinstance(chosen.checkpoint, str):
        read_card(chosen.checkpoint)
    bank, spec = open_bank(config.data), config.episodes.test
    check_spec(bank, spec, "test")
    cpu = torch.device("cpu")
    judged = build_learner(config, bank.image_shape, spec.num_ways, cpu)
    if chosen.checkpoint in ("best", "last"):
        of_training = open_bank(source.data)
        if of_training.hash != bank.hash and not config.evaluation.other_bank:
            raise UserError(f"{bank.folder}: is another bank than in training; {REMEDY}")
        image_shape = of_training.image_shape
        trained = build_learner(source, image_shape, source.episodes.train.num_ways, cpu)
        require_fitting(
            source.run_folder, trained.params | trained.moments, judged.params | judged.moments
        )


def _setting(study: Study, arm: TrainedArm) -> Setting:
    chosen, model, config = arm.chosen, arm.model, arm.config
    bank = open_bank(config.data)
    checkpoint = _checkpoint(chosen.checkpoint, model)
    if checkpoint is not None:
        require_bank(checkpoint, bank, other_bank_asked=config.evaluation.other_bank)
    changes = ", ".join(f"{key} {value}" for key, value in chosen.set.items())
    return Setting(
        name=chosen.name,
        description=f"{model.name}, {'initial weights' if checkpoint is None else checkpoint.name}"
        + (f", {changes}" if changes else ""),
        config=_with_episodes(study, bank, config),
        checkpoint=checkpoint,
        num_episodes=config.episodes.test.num_episodes,
        target_half_width=study.base.evaluation.target_half_width,
        folder=study.folder.parent / "records",
    )


def _checkpoint(which: Place | Which, model: Config) -> Place | None:
    if which == "initial":
        return None
    path = find_checkpoint(model.run_folder, which) if isinstance(which, str) else which
    require_of_its_run(path, model)
    return path


def _with_episodes(study: Study, bank: ImageBank, config: Config) -> Config:
    """Sample the test episodes of an arm; arms of one seed and shape share the folder."""
    spec = config.episodes.test
    digest = fold_in(config.episodes.seed, bank.hash, spec.model_dump_json())
    place = config.data.model_copy(
        update={"shards": study.folder.parent / "episodes" / f"{digest:016x}"}
    )
    config = config.model_copy(update={"data": place})
    write_shards(
        bank,
        spec,
        seed=config.episodes.seed,
        split="test",
        folder=place.shards / "test",
        cache=place.cache,
    )
    return config


def write_study_report(study: Study, campaign: Campaign) -> Place:
    """Write the report of a study's finished campaign; return the path of ``summary.json``."""
    # Here, since it imports matplotlib, which a process that only judges does not need.
    from raymaml.report.write import show_in_tensorboard, write_report

    results = campaign.results()
    records = {result.name: record_arrays(result.records) for result in results}
    trainings: dict[str, dict[int, str]] = {}
    for arm in study.arms:
        trainings.setdefault(arm.of, {})[arm.config.seed] = arm.chosen.name
    verdicts = reach_verdicts(
        study.settings.checks,
        {
            arm: {seed: records[name] for seed, name in names.items()}
            for arm, names in trainings.items()
        },
        stops_early=study.base.evaluation.target_half_width is not None,
    )
    path = write_report(
        campaign.folder,
        results,
        title=study.settings.title,
        identity={"study": study.settings.name},
        verdicts=[asdict(verdict) for verdict in verdicts],
        trainings=trainings,
        bank=campaign.arms[0].bank,
    )
    show_in_tensorboard(path)
    return path
