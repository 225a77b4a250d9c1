"""The form of the reference's files; what the values mean is for the converters to judge.

Its configurations come from YAML and from checkpoints. Keys that nobody knows are let through here
and named there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raymaml.common.errors import UserError

Size = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]
Text = Annotated[str, Field(max_length=4096)]
Scalar = Text | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | None
Flag = bool | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Norms(_Part):
    track_running_stats: Flag = None
    episodic: list[Text] | None = None
    alpha: Flag = None
    momentum: float | None = None
    eps: float = 1e-5
    affine: Flag = None


class _Encoder(_Part):
    bn_args: _Norms | None = None


class _Classifier(_Part):
    n_way: Annotated[int, Field(ge=1, le=10_000, strict=True)] = 5
    temp: float = 1.0
    learn_temp: Flag = None


class _Inner(_Part):
    reset_classifier: Flag = None
    n_step: Scalar = None
    encoder_lr: Scalar = None
    classifier_lr: Scalar = None
    momentum: Scalar = None
    weight_decay: Scalar = None
    first_order: Flag = None
    frozen: list[Text] | None = None


class _Section(_Part):
    root_path: Text | None = None
    split: Text | None = None
    image_size: Annotated[int, Field(ge=8, le=1024, strict=True)] = 84
    normalization: bool = True
    transform: Text | None = None
    val_transform: Text | None = None
    n_batch: Size = 1
    n_episode: Size = 1
    n_way: Annotated[int, Field(ge=2, le=10_000, strict=True)] = 5
    n_shot: Size = 1
    n_query: Size = 1


class _Optimizer(_Part):
    lr: float = 0.0
    weight_decay: float = 0.0
    schedule: Text | None = None
    milestones: list[Size] | None = None
    gamma: float = 0.1


class _Reference(_Section):
    """A configuration for training or for a test, or what a checkpoint says of its model."""

    dataset: Text | None = None
    train: _Section | None = None
    val: _Section | None = None
    test: _Section | None = None
    load: Text | None = None
    encoder: Text | None = None
    encoder_args: _Encoder | None = None
    classifier: Text | None = None
    classifier_args: _Classifier | None = None
    inner_args: _Inner | None = None
    optimizer: Text | None = None
    optimizer_args: _Optimizer | None = None
    epoch: Size | None = None


def require_form(config: Mapping[str, Any], file: object) -> None:
    """Check that each value of a configuration is of its kind.

    Raises:
        UserError: naming the file and each key that is not.
    """
    try:
        _Reference.model_validate(config)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise UserError(
            *(
                f"{file}: {'.'.join(map(str, each['loc']))[:100]}: {each['msg'][:200]}"
                for each in details[:20]
            )
        ) from None
