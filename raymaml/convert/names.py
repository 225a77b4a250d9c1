"""Parameter names: ours and the reference's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from raymaml.common.errors import UserError
from raymaml.common.patterns import matches
from raymaml.meta.learner import MetaLearner
from raymaml.models.convnet4 import ConvNet4
from raymaml.models.resnet import ResNet12, ResNet18

_RULES = (
    (r"^encoder\.stem\.", "encoder.layer0."),
    (r"^(encoder\.layer\d)\.0\.", r"\1."),
    (r"\.shortcut\.", ".res_conv."),
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
    is_resnet18 = isinstance(encoder, ResNet18) and len(list(encoder.layer1.children())) > 1
    if is_resnet18 or not isinstance(encoder, ConvNet4 | ResNet12 | ResNet18):
        raise UserError(
            f"the reference has no counterpart of the encoder {type(encoder).__name__}",
            remedy="it has convnet4, resnet12 and resnet10 (which it calls resnet18)",
        )
    return {name: _translated(name) for name in names}


def _translated(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def frozen_patterns(texts: Sequence[str], theirs: Mapping[str, str]) -> list[str]:
    """Return the widest patterns for the parameters whose name in the reference holds a text.

    Args:
        texts: parts of the reference's names.
        theirs: the reference's name of each of our parameters.
    """
    chosen = {ours for ours, name in theirs.items() if any(text in name for text in texts)}
    parts = [name.split(".") for name in theirs]
    prefixes = [".".join(part[:depth]) for depth in range(1, 10) for part in parts]
    candidates = dict.fromkeys(["encoder", "head", "*.norm", *prefixes])  # from the widest on
    patterns: list[str] = []
    left = set(chosen)
    for pattern in candidates:
        inside = {ours for ours in theirs if matches(pattern, ours)}
        if inside & left and inside <= chosen:
            patterns.append(pattern)
            left -= inside
    return patterns
