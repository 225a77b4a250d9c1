"""The parameters that the inner loop leaves alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from raymaml.common.patterns import matches, require_matches

NEVER_ADAPTED = ("temperature", "*.alpha_scale", "*.alpha_offset")
"""Meta-parameters that no inner step moves: the temperature, and how TaskNorm mixes moments."""


def frozen_params(key: str, model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that are not adapted.

    They match the patterns of the option ``key``, require no gradient, or never adapt.

    Raises:
        UserError: a pattern matches no parameter.
    """
    params = dict(model.named_parameters())
    require_matches(key, patterns, list(params))
    return {
        name
        for name, value in params.items()
        if not value.requires_grad or any(matches(p, name) for p in (*patterns, *NEVER_ADAPTED))
    }
