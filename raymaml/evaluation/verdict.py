"""What a report tells beside numbers: verdicts of claims, and outcomes of audits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

UNDECIDED: Literal["undecided at this size"] = "undecided at this size"
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Outcome = Literal["supported", "not supported", "undecided at this size"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, and what became of it."""

    claim: str
    outcome: Outcome
    scope: str
    """Whether the verdict is on a method, with the number of trainings, or on one trained model."""
    numbers: str
    """What it was decided by, a sentence."""
    p: float | None
    """Of the claim, by Holm over all claims of the study; None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What was found out about a model beside its accuracy."""

    name: str
    title: str
    outcome: Literal["passed", "flagged", "measured"]
    sentence: str
    """What was done and found."""
    rows: list[dict[str, str | bool | Integer | float | None]]
    """A table: dicts of equal keys."""
