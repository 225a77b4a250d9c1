"""Classifiers on top of an encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.layers import Pass
from raymaml.models.closed_form import closed_form
from raymaml.passes.closed import ClosedForm
from raymaml.types import Params


class Classifier(nn.Module):
    """An encoder and a linear head: images ``[B, C, H, W]`` -> logits ``[B, N]``.

    Everything under ``head.`` is the head.

    Args:
        encoder: images -> features ``[B, num_features]``.
        num_features: length of a feature vector.
        num_rows: rows of the head: N, or 1 for a shared head.
        temperature: factor of the logits.
        learn_temperature: make it a meta-parameter, ``temperature``, that never adapts.
    """

    temperature: Tensor | float
    head_start: str = "learned"
    """``model.head`` of the configuration: where the head starts in each episode."""

    def __init__(
        self,
        encoder: nn.Module,
        num_features: int,
        num_rows: int,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, num_rows)
        self.temperature = (
            nn.Parameter(torch.tensor(temperature)) if learn_temperature else temperature
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score images.

        Raises:
            UserError: the encoder gives no features ``[B, num_features]`` of the head's type.
        """
        features = self.encoder(x)
        self._require_features(features, x.shape[0])  # len(x) would fix the size in an export
        logits: Tensor = self.head(features) * self.temperature
        return logits

    def closed_form(self, current: Pass, params: Params, x: Tensor) -> ClosedForm | None:
        """Return passes in closed form; see ``passes.closed.InClosedForm``."""
        return closed_form(self, current, params, x) if type(self) is Classifier else None

    def _require_features(self, features: object, count: int) -> None:
        wanted = [count, self.head.in_features]
        if not isinstance(features, Tensor):
            found = f"a {type(features).__name__}"
        elif list(features.shape) != wanted:
            found = f"a tensor of shape {list(features.shape)}"
        elif features.dtype != self.head.weight.dtype and not (  # autocast brings both to one type
            features.is_floating_point() and torch.is_autocast_enabled(features.device.type)
        ):
            found = f"features of type {features.dtype}"
        else:
            return
        mode = "training" if self.training else "evaluation"
        raise UserError(
            f"model.encoder: {type(self.encoder).__name__} turns {count} images into {found} in"
            f" {mode} mode",
            remedy=f"it must give a tensor of shape {wanted} and type {self.head.weight.dtype},"
            " images first, in both modes",
        )
