"""What adapts in the inner loop and what stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from raymaml.common.patterns import matches, require_matches
from raymaml.types import Params

NEVER_ADAPTED = ("temperature", "*.alpha_scale", "*.alpha_offset")
"""Meta-parameters that no inner step moves: the temperature, and how TaskNorm mixes moments."""


def frozen_names(key: str, names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the parameters that are not adapted by the patterns of the option ``key``.

    Raises:
        UserError: a pattern matches no parameter.
    """
    require_matches(key, patterns, names)
    return {
        name
        for name in names
        if any(matches(pattern, name) for pattern in (*patterns, *NEVER_ADAPTED))
    }


def frozen_params(key: str, model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the parameters of a model that are not adapted: those that require no gradient, too.

    Raises:
        UserError: a pattern matches no parameter.
    """
    params = dict(model.named_parameters())
    fixed = {name for name, parameter in params.items() if not parameter.requires_grad}
    return fixed | frozen_names(key, list(params), patterns)


def adaptation_table(params: Params, frozen: set[str]) -> str:
    """Lay out, a line a module, how many parameters it has and whether they adapt."""
    counts: dict[tuple[str, bool], int] = {}
    for name, value in params.items():
        row = (name.rpartition(".")[0] or name, name not in frozen)
        counts[row] = counts.get(row, 0) + value.numel()
    adapted = sum(count for (_, adapts), count in counts.items() if adapts)
    lines = [
        f"  {module:<32} {count:>12,}  {'adapts' if adapts else 'frozen'}"
        for (module, adapts), count in counts.items()
    ]
    total = sum(counts.values())
    return "\n".join([*lines, f"  {'in all':<32} {total:>12,}  {adapted:,} adapt"])
