"""A study: train its models where they are not trained yet, judge its arms, reach verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from raymaml.common.errors import UserError, gathered
from raymaml.common.logs import plain
from raymaml.config.schema import SPLITS, AllEpisodes, Config, DataConfig
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import HEADER_FILE
from raymaml.data.importers import import_bank
from raymaml.data.sampling import check_spec, spec_in
from raymaml.data.shard_format import MANIFEST_FILE
from raymaml.data.shards import Sampling
from raymaml.evaluation.arm import Arm, Shared
from raymaml.evaluation.campaign import Campaign, Echo, Plan
from raymaml.evaluation.records import record_arrays
from raymaml.evaluation.results import OTHER_BANK_REMEDY, other_bank
from raymaml.experiments.study_file import Study, TrainedArm
from raymaml.seeding import fold_in
from raymaml.storage.files import exists
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoints, read_card
from raymaml.training.data import open_bank, sample_shards
from raymaml.training.origin import require_of_its_run, require_of_today, require_trained_by
from raymaml.training.run import is_done
from raymaml.training.state import build_learner, require_fitting


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
        UserError: any of these steps finds a mistake; mistakes of arms are found before training.
    """
    configs = {config.name: config for config in study.trainings}.values()
    untrained = []
    for config in configs:
        require_of_today(config.run_folder)
        if is_done(config.run_folder, config.outer):
            require_trained_by(config.run_folder, config.learning)
        else:
            untrained.append(config)
    for config in untrained:
        provide_data(config.data, config.episodes, echo)
    if untrained:
        with gathered() as mistakes:
            for arm in study.arms:
                with mistakes.kept(arm.chosen.name):
                    _require_judgeable(arm)
    for run in itertools.chain(*(config.stages for config in untrained)):
        if not train(run, echo):
            return None
    plan: Plan = partial(plan_study, study)
    return write_study_report(study, judge(plan, study.base.cluster, echo))


def provide_data(data: DataConfig, episodes: AllEpisodes, echo: Echo) -> None:
    """Make bank and shards, where they are not there; what is there is left to be checked."""
    if not exists(data.bank / HEADER_FILE):
        bank = import_bank(data, episodes, lambda note: echo(plain(note)))
        echo(plain(f"{bank.folder}: {bank.num_images} images of {bank.source}"))
    manifests = (data.shards / split / MANIFEST_FILE for split in SPLITS[:2])
    if not all(exists(manifest) for manifest in manifests):
        for shards in sample_shards(data, episodes, open_bank(data)):
            echo(f"{shards.folder}: {shards.count} episodes")


def plan_study(study: Study, device: torch.device) -> Campaign:
    """Plan the campaign of a study: sample its test episodes, and check every arm.

    Raises:
        UserError: naming all that is wrong with any arm.
    """
    shared = Shared(device)
    arms: list[Arm] = []
    with gathered() as mistakes:
        for arm in study.arms:
            with mistakes.kept(arm.chosen.name):
                arms.append(_arm(study, arm, shared))
                arms[-1].build()
    return Campaign(
        name=f"{study.base.name}/{study.settings.name}",
        folder=study.folder,
        records=study.folder.parent / "records",
        arms=tuple(arms),
        chunk_size=study.base.evaluation.chunk_size,
    )


def _require_judgeable(arm: TrainedArm) -> None:
    """Check what can be known of an arm before its model is trained.

    Raises:
        UserError: its episodes, its model or its weights would be refused later.
    """
    chosen, config, source = arm.chosen, arm.config, arm.model
    if not isinstance(chosen.checkpoint, str):
        read_card(chosen.checkpoint)
    bank = open_bank(config.data)
    spec = spec_in(bank, config.episodes, "test")
    check_spec(bank, spec, "test")
    cpu = torch.device("cpu")
    judged = build_learner(config, bank.image_shape, spec.num_ways, cpu)
    if isinstance(chosen.checkpoint, str) and chosen.checkpoint != "initial":
        of_training = open_bank(source.data)
        if of_training.hash != bank.hash and not config.evaluation.other_bank:
            raise UserError(f"{bank.folder}: is another bank than in training; {OTHER_BANK_REMEDY}")
        image_shape = of_training.image_shape
        trained = build_learner(source, image_shape, source.episodes.train.num_ways, cpu)
        require_fitting(
            source.run_folder, trained.params | trained.moments, judged.params | judged.moments
        )


def _arm(study: Study, arm: TrainedArm, shared: Shared) -> Arm:
    chosen, model, config = arm.chosen, arm.model, arm.config
    bank = open_bank(config.data)
    checkpoints: tuple[Place, ...] = ()
    if chosen.checkpoint != "initial":
        which = chosen.checkpoint
        if isinstance(which, str):
            checkpoints = find_checkpoints(model.run_folder, which)
        else:
            checkpoints = (which,)
    for checkpoint in checkpoints:
        require_of_its_run(checkpoint)
        other_bank(checkpoint, bank, asked=config.evaluation.other_bank)  # before it is sampled
    changes = ", ".join(f"{key} {value}" for key, value in chosen.set.items())
    weights = " + ".join(each.name for each in checkpoints) or "initial weights"
    shards = _sample_test(
        study.folder.parent / "episodes", bank, config.episodes, config.data.cache
    )
    data = config.data.model_copy(update={"shards": shards})
    return Arm(
        name=chosen.name,
        description=f"{model.name}, {weights}" + (f", {changes}" if changes else ""),
        config=config.model_copy(update={"data": data}),
        checkpoints=checkpoints,
        num_episodes=config.episodes.test.num_episodes,
        target_half_width=study.base.evaluation.target_half_width,
        folder=study.folder.parent / "records",
        shared=shared,
    )


def _sample_test(folder: Place, bank: ImageBank, episodes: AllEpisodes, cache: Path) -> Place:
    """Sample the test episodes of an arm below ``folder``; arms of one seed and shape share."""
    seed, spec = episodes.seed, spec_in(bank, episodes, "test")
    shards = folder / f"{fold_in(seed, bank.hash, spec.model_dump_json()):016x}"
    Sampling(bank, spec, seed=seed, split="test", folder=shards / "test", cache=cache).write()
    return shards


def write_study_report(study: Study, campaign: Campaign) -> Place:
    """Write the report of a study's finished campaign; return the path of ``summary.json``."""
    # they import matplotlib and scipy.stats, which a process that only judges does not need
    from raymaml.experiments.verdicts import reach_verdicts
    from raymaml.reports.write import show_in_tensorboard, write_report

    results = campaign.results()
    records = {result.name: record_arrays(result.records) for result in results}
    trainings: dict[str, dict[int, str]] = {}
    for arm in study.arms:
        trainings.setdefault(arm.of, {})[arm.config.seed] = arm.chosen.name
    judged = {
        arm: {seed: records[name] for seed, name in names.items()}
        for arm, names in trainings.items()
    }
    stops_early = study.base.evaluation.target_half_width is not None
    verdicts = reach_verdicts(study.settings.checks, judged, stops_early=stops_early)
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
