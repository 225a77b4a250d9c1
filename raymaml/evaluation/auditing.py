"""The audits of a run, kept beside its test for the report."""

from __future__ import annotations

from raymaml.common.untrusted import json_text
from raymaml.config.schema import Config
from raymaml.evaluation.audit import Subject, all_audits, as_json
from raymaml.evaluation.campaign import Echo
from raymaml.evaluation.others import predictor
from raymaml.evaluation.plan import AUDITS_FILE, plan_test
from raymaml.storage.files import write_text
from raymaml.storage.place import Place
from raymaml.training.process import prepare_process
from raymaml.training.session import local_device


def audit_run(config: Config, echo: Echo) -> Place:
    """Audit the model of a run on its test episodes, and keep the results for its report.

    Raises:
        UserError: as `raymaml test`.
    """
    device = local_device(config.cluster)
    prepare_process(config.cluster, device)
    campaign = plan_test(config, device)
    arm = campaign.arms[0]
    subject = Subject(
        predict=predictor(campaign.learner(arm)),
        episodes=campaign.episodes(arm),
        bank=campaign.bank(arm),
        seed=config.episodes.seed,
    )
    found = []
    for name, audit in all_audits(inductive=not config.model.is_transductive).items():
        found.append(audit(subject))
        echo(f"{name}: {found[-1].outcome}. {found[-1].sentence}")
    path = campaign.folder / AUDITS_FILE
    content = {"identity": campaign.identity(arm), "audits": as_json(found)}
    write_text(path, json_text(content, indent=2) + "\n")
    return path
