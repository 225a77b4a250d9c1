"""The audits of a run; their results lie beside its test, and its next report shows them."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import BaseModel, TypeAdapter, model_validator

from raymaml.common.untrusted import json_text
from raymaml.config.schema import Config
from raymaml.evaluation.audit import AuditResult, Subject, all_audits
from raymaml.evaluation.campaign import Campaign, Echo
from raymaml.evaluation.examination import read_json
from raymaml.evaluation.run_test import plan_test
from raymaml.storage.files import write_text
from raymaml.storage.place import Place
from raymaml.training.settings import local_device, prepare_process

AUDITS_FILE = "audits.json"


class AuditsFile(BaseModel):
    """The content of ``audits.json``."""

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
        predict=arm.build().predict,
        episodes=arm.episodes,
        bank=arm.bank,
        seed=config.episodes.seed,
    )
    found = []
    for name, audit in all_audits(inductive=not config.model.is_transductive).items():
        found.append(audit(subject))
        echo(f"{name}: {found[-1].outcome}. {found[-1].sentence}")
    path = campaign.folder / AUDITS_FILE
    content = {"identity": arm.identity, "audits": [asdict(each) for each in found]}
    write_text(path, json_text(content, indent=2) + "\n")
    return path


def read_audits(campaign: Campaign) -> list[AuditResult]:
    """Return the audits of what ``campaign`` judges first; those of anything else are left out."""
    remedy = "remove it, or run `raymaml audit` again"
    content = read_json(campaign.folder / AUDITS_FILE, _AUDITS, remedy)
    if content is None or content.identity != campaign.arms[0].identity:
        return []
    return list(content.audits)
