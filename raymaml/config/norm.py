"""The key `model.norm`: a policy, a policy with options, or either by name pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from raymaml.config.base import Section

NormPolicy = Literal[
    "transductive",
    "running",
    "episodic",
    "episodic_biased",
    "context",
    "tasknorm_i",
    "tasknorm_l",
    "tasknorm_reference",
    "instance",
    "layer",
    "none",
]
TRANSDUCTIVE = {"transductive"}
"""Policies by which a prediction depends on the other queries."""
BY_THE_BATCH = {
    *("transductive", "running", "episodic", "episodic_biased", "context", "tasknorm_reference")
}
"""Policies that normalise the support set by its batch, for which there are closed rules."""


class NormOptions(Section):
    """A policy with options."""

    policy: NormPolicy
    """Whose moments the query pass uses (table in raymaml/models/README.md)."""
    per_step: Literal["none", "affine", "running", "both"] = "none"
    """Each inner step of training has its own (Antoniou et al. 2019): affine: scale and shift;
    running: running moments. Further steps at test take those of the last."""
    scale: bool = True
    """false: shift alone."""

    @model_validator(mode="after")
    def _fit_the_policy(self) -> NormOptions:
        per_step = f"model.norm.per_step is {self.per_step} but model.norm.policy is {self.policy}"
        if self.policy == "none" and self.per_step != "none":
            raise ValueError(f"{per_step}: none has neither scale and shift nor moments")
        if self.policy == "none" and not self.scale:
            raise ValueError("model.norm.scale is false but model.norm.policy is none: it has none")
        if self.per_step in ("running", "both") and self.policy != "running":
            raise ValueError(
                f"{per_step}: only running keeps moments from episode to episode; affine gives each"
                " step a scale and shift"
            )
        return self

    def __str__(self) -> str:
        """Return the options as results print them: ``running per_step=both scale=false``."""
        per_step = "" if self.per_step == "none" else f" per_step={self.per_step}"
        return f"{self.policy}{per_step}{'' if self.scale else ' scale=false'}"


def _shortest(norm: NormOptions) -> NormPolicy | NormOptions:
    """Return the policy alone where it has no options, so that both spellings are one value."""
    return norm.policy if norm == NormOptions(policy=norm.policy) else norm


def _branch(value: object) -> str:
    """Return the tag of a value; the tags are no keys of a section."""
    if isinstance(value, NormOptions):
        return "with options"
    if not isinstance(value, Mapping):
        return "policy alone"
    return "by pattern" if value.keys().isdisjoint(NormOptions.model_fields) else "with options"


_Alone = Annotated[NormPolicy, Tag("policy alone")]
_WithOptions = Annotated[NormOptions, AfterValidator(_shortest), Tag("with options")]
_OfLayers = Annotated[
    _Alone | _WithOptions,
    Discriminator(lambda value: _branch(value).replace("by pattern", "with options")),
]
_ByPattern = Annotated[dict[str, _OfLayers], Field(min_length=1), Tag("by pattern")]
Norm = Annotated[_Alone | _WithOptions | _ByPattern, Discriminator(_branch)]
