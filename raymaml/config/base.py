"""The types of fields and sections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import PydanticCustomError

from raymaml.storage.place import Place, at_home, to_place

T = TypeVar("T")


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "should be a number")  # YAML reads yes as true
    return value


def _with_reason(read: Callable[[Any], T]) -> Callable[[Any], T]:
    """Let pydantic add key and value to an error of ``read``."""

    def checked(value: Any) -> T:
        try:
            return read(value)
        except ValueError as error:
            raise PydanticCustomError("place", "{reason}", {"reason": str(error)}) from None

    return checked


read_place = _with_reason(to_place)
Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**63 - 1, strict=True)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]
Steps = Annotated[Count, Field(le=100_000)]
"""Inner steps."""
Seconds = Annotated[Number, Field(gt=0, le=10_000_000)]
"""A time to wait, s; timers overflow beyond the maximum."""
Rate = Annotated[Number, Field(ge=0)]
PositiveRate = Annotated[Number, Field(gt=0)]
PlaceField = Annotated[Place, PlainValidator(read_place), PlainSerializer(str, when_used="json")]
"""A folder on disk, or a URI."""
Augmentation = Literal["none", "flip", "crop", "color", "resize", "enlarge"]
PathField = Annotated[Path, AfterValidator(_with_reason(at_home))]
"""A file or folder on disk."""


class Section(BaseModel):
    """Frozen; unknown keys are errors; the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def changed(self) -> list[str]:
        """The names of the keys that do not have their default."""
        fields = type(self).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields}
        return [name for name, default in defaults.items() if getattr(self, name) != default]
