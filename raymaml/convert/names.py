"""Parameter names: ours and the reference's."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from raymaml.common.errors import UserError
from raymaml.meta.learner import MetaLearner
from raymaml.models.convnet4 import ConvNet4
from raymaml.models.resnet12 import ResNet12
from raymaml.models.resnet18 import ResNet18

_RULES = (
    (r"^encoder\.stem\.conv\.", "encoder.layer0.conv."),
    (r"^encoder\.stem\.norm\.", "encoder.layer0.bn."),
    (r"^(encoder\.layer\d)\.0\.", r"\1."),
    (r"\.shortcut\.conv\.", ".res_conv.conv."),
    (r"\.shortcut\.norm\.", ".res_conv.bn."),
    (r"^(encoder\.layer\d)\.conv(\d)\.conv\.", r"\1.conv\2."),
    (r"^(encoder\.layer\d)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^encoder\.conv(\d)\.", r"encoder.encoder.conv\1."),
    (r"\.norm\.", ".bn."),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
    (r"^head\.", "classifier.linear."),
    (r"^temperature$", "classifier.temp"),
)


def reference_names(learner: MetaLearner) -> dict[str, str]:
    """Return the reference's name of each parameter of the learner's model.

    Raises:
        UserError: the reference has no such encoder.
    """
    return their_names(learner.model, dict(learner.model.named_parameters()))


def their_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the reference's name of each of these parameters and buffers of ``model``.

    Raises:
        UserError: the reference has no such encoder.
    """
    encoder = model.get_submodule("encoder")
    known = isinstance(encoder, ConvNet4 | ResNet12)
    if isinstance(encoder, ResNet18):
        known = len(list(encoder.layer1.children())) == 1
    if not known:
        raise UserError(
            f"the reference has no counterpart of the encoder {type(encoder).__name__}; it has"
            " convnet4, resnet12 and resnet10 (which it calls resnet18)"
        )
    return {name: _translated(name) for name in names}


def _translated(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
