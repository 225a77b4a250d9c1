"""The results of a finished campaign, arm by arm, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.evaluation.examination import Examination
from raymaml.statistics.confidence_sequence import Stopping

NOT_EXAMINED = "caution: not examined whether its logits follow their images"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions of an accuracy, beside the weights."""

    episodes: str
    """Their shape, such as ``5-way 1-shot 15-query``."""
    norm: str
    """Whether the arm is inductive, and its norm."""
    num_steps: int
    """Inner steps."""
    head: str
    """Where the head starts, as ``model.head`` says."""
    caution: str = ""
    """The warning of the model's examination; empty: there is none."""
    remarks: Sequence[str] = ()
    """Such as: the bank is not the one of training, or the encoder was edited."""

    @property
    def is_transductive(self) -> bool:
        """Whether a prediction depends on the other queries."""
        return self.norm.startswith("transductive")

    @property
    def starts_equal(self) -> bool:
        """Whether the head gives all classes equal logits before the first inner step."""
        return self.head in ("zero", "shared")

    def __str__(self) -> str:
        """Return one line: ``5-way 1-shot 15-query | transductive | 1 step | head zero | ...``."""
        steps = f"{self.num_steps} step" + "s" * (self.num_steps != 1)
        parts = (self.episodes, self.norm, steps, f"head {self.head}", "single model", self.caution)
        return " | ".join([*filter(None, parts), *self.remarks])


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The records of one arm of a campaign."""

    name: str
    description: str
    """Of the arm, one sentence."""
    protocol: Protocol
    records: pa.Table
    """As ``record_files.read_records`` returns them."""
    identity: Mapping[str, Any]
    """The values that decide the records: weights, model, episodes, versions, ..."""
    stopping: Stopping | None = None
    """The rule that may have ended judging early; None: there was none."""
    circumstances: Sequence[Mapping[str, str]] = ()
    """Of the chunks, as ``record_files.read_circumstances`` returns them: hardware, hashes, ..."""


def protocol_of(
    spec: EpisodesConfig,
    model: ModelConfig,
    num_steps: int,
    examination: Examination | None,
    remarks: Sequence[str] = (),
) -> Protocol:
    """Return the protocol of a model on episodes of this shape.

    Args:
        spec: shape of the episodes.
        model: norm and head.
        num_steps: inner steps at test.
        examination: of the model; None: it was not examined.
        remarks: further parts of the line.
    """
    return Protocol(
        episodes=f"{spec.num_ways}-way {spec.num_shots}-shot {spec.num_queries}-query",
        norm=_norm_text(model, examination),
        num_steps=num_steps,
        head=model.head,
        caution=NOT_EXAMINED if examination is None else examination.caution,
        remarks=remarks,
    )


def _norm_text(model: ModelConfig, examination: Examination | None) -> str:
    """Name the norm; the reader of a number needs to know whether it is inductive.

    An encoder of raymaml is inductive by its norm, as tests prove, unless the examination says
    otherwise. Any other encoder is inductive only where that was measured.
    """
    if model.norm == "transductive":
        return "transductive"
    if model.is_transductive:
        return f"transductive ({model.norm_text})"
    measured = None if examination is None else examination.is_inductive
    if model.encoder in ENCODERS and measured is not False:
        return f"inductive ({model.norm_text})"
    if examination is None or measured is None:
        return f"not known to be inductive ({model.norm_text})"
    kind = "inductive" if measured else "transductive"
    return f"{kind}, measured on {examination.episodes} episodes ({model.norm_text})"
