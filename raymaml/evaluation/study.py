"""A study: models that are trained where they are not yet, arms that are judged, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from raymaml.config.load import Changes, load_config, load_study
from raymaml.config.schema import Config
from raymaml.config.study import StudyArm, StudyConfig
from raymaml.data.bank import ImageBank
from raymaml.data.episodes import write_shards
from raymaml.data.importers import import_bank
from raymaml.errors import UserError
from raymaml.evaluation.campaign import Arm, Campaign, Echo, Plan
from raymaml.evaluation.records import record_arrays
from raymaml.seeding import fold_in
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import open_bank, sample_shards, shards_folder
from raymaml.training.run_folder import is_done, require_trained_by


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file with the configs that it makes."""

    settings: StudyConfig
    base: Config
    models: dict[str, Config]
    """What is trained, by name of the model."""
    arms: tuple[tuple[StudyArm, str, Config], ...]
    """Each arm with its model and its config."""

    @property
    def folder(self) -> Path:
        """Where the report is written; episodes and records lie beside it, for all studies."""
        return self.base.run_dir / "studies" / self.base.name / self.settings.name


def read_study(path: Path, overrides: Sequence[str] = (), config_path: Path | None = None) -> Study:
    """Read a study file and every config that it makes.

    Args:
        path: the study file.
        overrides: change the config of all models and arms, after the file's own ``set``.
        config_path: what all start from instead of the config that the file names.

    Raises:
        UserError: with every problem of any of them.
    """
    settings = load_study(path)
    place = path.parent / settings.config if config_path is None else config_path
    problems: list[str] = []

    def config(*layers: Changes | Sequence[str]) -> Config | None:
        try:
            return load_config(place, *layers)
        except UserError as error:
            problems.extend(error.problems)
            return None

    common = Changes(f"{path}: set", settings.set)
    base = config(common, overrides)
    if base is None:
        raise UserError(*problems)
    models, arms = {}, []
    for name, changes in (settings.models or {"model": {}}).items():
        named = {"name": f"{base.name}-{name}", **changes} if changes else {}
        layer = Changes(f"{path}: models: {name}", named)
        models[name] = (layer, config(common, overrides, layer))
    for arm in settings.crossed_arms():
        model = next(iter(models)) if arm.model is None else arm.model
        changed = Changes(f"{path}: arms: {arm.name}", arm.set)
        arms.append((arm, model, config(common, overrides, models[model][0], changed)))
    if problems:
        raise UserError(*problems)
    return Study(
        settings=settings,
        base=base,
        models={name: made for name, (_, made) in models.items() if made is not None},
        arms=tuple((arm, model, made) for arm, model, made in arms if made is not None),
    )


def run_study(
    study: Study,
    *,
    train: Callable[[Config, Echo], bool],
    judge: Callable[..., Path],
    echo: Echo,
) -> Path | None:
    """Import, sample and train what is missing, judge what is missing, and write the report.

    Returns:
        The path of ``summary.json``; None where training was interrupted.

    Raises:
        UserError: what any of these steps finds wrong.
    """
    for config in {config.name: config for config in study.models.values()}.values():
        if not _is_trained(config):
            provide_data(config, echo)
            if not train(config, echo):
                return None
    plan: Plan = partial(plan_study, study)
    return judge(plan, study.base.cluster, echo)


def _is_trained(config: Config) -> bool:
    """Tell whether the run is done; one of another config is said to be that."""
    if not is_done(config.run_folder, config):
        return False
    require_trained_by(config)
    return True


def provide_data(config: Config, echo: Echo) -> None:
    """Make bank and shards, where they are not there; what is there is left to be checked."""
    if not config.data.bank.exists():
        bank = import_bank(config.data, config.episodes)
        echo(f"{bank.folder}: {bank.num_images} images of {bank.source}")
    missing = [split for split in ("train", "val") if not shards_folder(config, split).exists()]
    if missing:
        for shards in sample_shards(config, open_bank(config)):
            echo(f"{shards.folder}: {shards.count} episodes")


def plan_study(study: Study, device: torch.device) -> Campaign:
    """Plan the campaign of a study: sample its test episodes, and check every arm.

    Raises:
        UserError: naming all that is wrong with any arm.
    """
    arms: list[Arm] = []
    problems: list[str] = []
    for chosen, model, config in study.arms:
        try:
            arms.append(_arm(study, chosen, study.models[model], config))
        except UserError as error:
            problems.extend(f"{chosen.name}: {problem}" for problem in error.problems)
    if problems:
        raise UserError(*problems)
    evaluation = study.base.evaluation
    campaign = Campaign(
        folder=study.folder,
        records=study.folder.parent / "records",
        arms=tuple(arms),
        device=device,
        chunk_size=evaluation.chunk_size,
        target_half_width=evaluation.target_half_width,
        write=partial(_write, study),
    )
    for arm in arms:
        try:
            campaign.learner(arm)
        except UserError as error:
            problems.extend(f"{arm.name}: {problem}" for problem in error.problems)
    if problems:
        raise UserError(*problems)
    return campaign


def _arm(study: Study, chosen: StudyArm, model: Config, config: Config) -> Arm:
    bank = open_bank(config)
    checkpoint = _checkpoint(chosen.checkpoint, model.run_folder)
    changes = ", ".join(f"{key} {value}" for key, value in chosen.set.items())
    return Arm(
        name=chosen.name,
        description=f"{model.name}, {'initial weights' if checkpoint is None else checkpoint.name}"
        + (f", {changes}" if changes else ""),
        config=_with_episodes(study, bank, config),
        checkpoint=checkpoint,
        num_episodes=config.episodes.test.num_episodes,
    )


def _checkpoint(which: Path | Literal["best", "last", "initial"], folder: Path) -> Path | None:
    if isinstance(which, Path):
        read_card(which)
        return which
    return None if which == "initial" else find_checkpoint(folder, which)


def _with_episodes(study: Study, bank: ImageBank, config: Config) -> Config:
    """Sample the test episodes of an arm; arms of one seed and shape share the folder."""
    spec = config.episodes.test
    digest = fold_in(config.seed, bank.hash, spec.model_dump_json())
    place = config.data.model_copy(
        update={"shards": study.folder.parent / "episodes" / f"{digest:016x}"}
    )
    config = config.model_copy(update={"data": place})
    write_shards(bank, spec, seed=config.seed, split="test", folder=shards_folder(config, "test"))
    return config


def _write(study: Study, campaign: Campaign) -> Path:
    from raymaml.evaluation.report import show_in_tensorboard, write_report
    from raymaml.evaluation.verdicts import reach_verdicts

    results = campaign.results()
    path = write_report(
        campaign.folder,
        results,
        title=study.settings.title,
        identity={"study": study.settings.name},
        verdicts=reach_verdicts(
            study.settings.checks,
            {result.name: record_arrays(result.records) for result in results},
        ),
        bank=campaign.bank(campaign.arms[0]),
    )
    show_in_tensorboard(path)
    return path
