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


def adaptation_table(model: nn.Module, frozen: set[str]) -> str:
    """Lay out, a line a module, how many parameters it has and whether they adapt."""
    counts: dict[tuple[str, bool], int] = {}
    for name, value in model.named_parameters():
        row = (name.rpartition(".")[0] or name, name not in frozen)
        counts[row] = counts.get(row, 0) + value.numel()
    lines = [
        f"  {module:<32} {count:>12,}  {'adapts' if adapts else 'frozen'}"
        for (module, adapts), count in counts.items()
    ]
    adapted = sum(count for (_, adapts), count in counts.items() if adapts)
    return "\n".join([*lines, f"  {'in all':<32} {sum(counts.values()):>12,}  {adapted:,} adapt"])
