"""The test of one run: the model, and the baselines that show what it learned."""

from __future__ import annotations

import torch

from raymaml.config.schema import Config
from raymaml.evaluation.campaign import Arm, Campaign
from raymaml.evaluation.identity import of_any_code
from raymaml.evaluation.provenance import require_bank
from raymaml.training.checkpoint import find_checkpoint, require_same_model
from raymaml.training.run_folder import require_of_its_run


def plan_test(config: Config, device: torch.device) -> Campaign:
    """Plan the campaign of `raymaml test`.

    Raises:
        UserError: the run has no checkpoint, or test episodes are missing or do not fit.
    """
    campaign = _plan(config, device)
    model = campaign.arms[0]
    # all that is wrong is said now, before any work
    if model.checkpoint is not None:
        require_same_model(model.checkpoint, config, campaign.bank(model).image_shape)
    campaign.learner(model)
    return campaign


def plan_report(config: Config) -> Campaign:
    """Plan to report finished records, whatever versions and source of the encoder they are of.

    No model is built, and no encoder imported.

    Raises:
        UserError: as ``plan_test``; or episodes are not judged yet.
    """
    campaign = _plan(config, torch.device("cpu"))
    for arm in campaign.arms:
        found = of_any_code(campaign.place_of(arm), campaign.settings(arm))
        for identity in (*found, *found[:1]):  # the newest, where none is finished
            campaign.carried[arm.name] = identity
            if not campaign.missing_of(arm):
                break
    return campaign.require_finished()


def _plan(config: Config, device: torch.device) -> Campaign:
    checkpoint = find_checkpoint(config.run_folder, config.evaluation.checkpoint)
    require_of_its_run(checkpoint, config)
    few = min(config.evaluation.baseline_episodes, config.episodes.test.num_episodes)
    model = Arm(
        name="model",
        description=f"{config.evaluation.checkpoint} checkpoint, adapted",
        config=config,
        checkpoint=checkpoint,
        num_episodes=config.episodes.test.num_episodes,
    )
    untrained = Arm(
        name="untrained",
        description="initial weights, adapted alike",
        config=config,
        checkpoint=None,
        num_episodes=few,
    )
    unadapted = Arm(
        name="no-adaptation",
        description="trained weights, no inner step",
        config=_without_steps(config),
        checkpoint=checkpoint,
        num_episodes=few,
    )
    baselines = (untrained, unadapted) if _tells_without_steps(config) else (untrained,)
    campaign = Campaign(
        name=config.name,
        folder=config.run_folder / "test",
        arms=(model, *baselines) if few else (model,),
        device=device,
        chunk_size=config.evaluation.chunk_size,
        target_half_width=config.evaluation.target_half_width,
    )
    require_bank(checkpoint, config, campaign.bank(model))
    return campaign


def _tells_without_steps(config: Config) -> bool:
    """Whether an arm without adaptation says more than chance, or than the model itself."""
    return config.model.head == "learned" and config.test_inner.num_steps > 0


def _without_steps(config: Config) -> Config:
    inner = config.evaluation.inner.model_copy(update={"num_steps": 0})
    evaluation = config.evaluation.model_copy(update={"inner": inner})
    return config.model_copy(update={"evaluation": evaluation})
