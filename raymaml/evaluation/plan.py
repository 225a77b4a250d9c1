"""The test of one run: the model, and the baselines that show what it learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from pydantic import BaseModel, TypeAdapter, model_validator

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import checked, parse_json
from raymaml.config.schema import Config
from raymaml.evaluation.campaign import Arm, Campaign
from raymaml.evaluation.identity import of_any_code
from raymaml.evaluation.provenance import require_bank
from raymaml.evaluation.verdict import AuditResult
from raymaml.storage.files import exists, read_bytes
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoint, require_same_model
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.run_folder import require_of_its_run

AUDITS_FILE = "audits.json"


class AuditsFile(BaseModel):
    """What ``audits.json`` holds."""

    identity: dict[str, str]
    """Of what was audited."""
    audits: tuple[AuditResult, ...]

    @model_validator(mode="after")
    def _rows_are_tables(self) -> AuditsFile:
        for audit in self.audits:
            if any(row.keys() != audit.rows[0].keys() for row in audit.rows):
                raise ValueError(f"the rows of {audit.name} have different keys")
        return self


_AUDITS = TypeAdapter(AuditsFile)


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
    """Plan to render finished records, of whatever versions and source of the encoder they are.

    No model is built, and no encoder imported.

    Raises:
        UserError: as ``plan_test``.
    """
    campaign = _plan(config, torch.device("cpu"))
    carried = {}
    for arm in campaign.arms:
        found = of_any_code(campaign.place_of(arm), campaign.settings(arm))
        done = [each for each in found if _is_finished(campaign, arm, each)]
        if chosen := (done or found)[:1]:
            carried[arm.name] = chosen[0]
    return replace(campaign, carried=carried)


def _is_finished(campaign: Campaign, arm: Arm, identity: Mapping[str, str]) -> bool:
    one = replace(campaign, arms=(arm,), carried={arm.name: identity})
    return not one.missing()


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
        write=partial(_write, config),
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


def _write(config: Config, campaign: Campaign) -> Place:
    # Here, since it imports matplotlib, which no process that only judges needs.
    from raymaml.evaluation.report import show_in_tensorboard, write_report

    curve = read_metrics(config.run_folder / METRICS_FILE)
    path = write_report(
        campaign.folder,
        campaign.results(),
        title=f"{config.name}: test report",
        identity={},
        curve=[row for row in curve if "val_accuracy" in row],
        audits=read_audits(campaign),
        bank=campaign.bank(campaign.arms[0]),
    )
    show_in_tensorboard(path)
    return path


def read_audits(campaign: Campaign) -> list[AuditResult]:
    """Return the audits of what ``campaign`` judges first; those of anything else are left out."""
    path = campaign.folder / AUDITS_FILE
    if not exists(path):
        return []
    try:
        content = checked(_AUDITS, parse_json(read_bytes(path)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: is damaged ({reason_of(error)}); remove it, or run `raymaml audit` again"
        ) from None
    if content.identity != campaign.identity(campaign.arms[0]):
        return []
    return list(content.audits)
