"""What every section of the config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it should be a number")  # YAML reads yes and on as true
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[Number, Field(ge=0)]
PositiveRate = Annotated[Number, Field(gt=0)]


class Section(BaseModel):
    """Frozen; unknown keys are errors; the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
