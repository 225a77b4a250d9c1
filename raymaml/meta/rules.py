"""The update rule of the inner loop, and the parameters that it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from raymaml.common.patterns import matches, require_matches
from raymaml.config.model import InnerConfig
from raymaml.types import Params

NEVER_ADAPTED = ("temperature", "*.alpha_scale", "*.alpha_offset")
"""Meta-parameters that no inner step moves: the temperature, and how TaskNorm mixes moments."""


def learning_rate(name: str, inner: InnerConfig, head: str = "head") -> float:
    """Return the inner rate of the parameter ``name``; ``head`` is the name of the head."""
    if name.startswith(f"{head}.") and inner.head_lr is not None:
        return inner.head_lr
    return inner.lr


def sgd(
    fast: Params,
    velocity: Params,
    grads: Mapping[str, Tensor | None],
    rates: Mapping[str, float],
    inner: InnerConfig,
) -> tuple[Params, Params]:
    """Take one step of gradient descent with weight decay and momentum, as ``torch.optim.SGD``.

    Args:
        fast: weights before the step.
        velocity: by the same names, zero before the first step; empty without momentum.
        grads: None for a weight that the loss does not depend on, which stays as it is.
        rates: inner rates by the same names.
        inner: momentum and weight decay.

    Returns:
        Weights and velocity after the step: new dictionaries, differentiable in all arguments.
    """
    new_fast, new_velocity = dict(fast), dict(velocity)
    for name, weight in fast.items():
        move = grads[name]
        if move is None:
            continue
        if inner.weight_decay:
            move = move + inner.weight_decay * weight
        if inner.momentum:
            move = new_velocity[name] = move + inner.momentum * velocity[name]
        new_fast[name] = weight - rates[name] * move
    return new_fast, new_velocity


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
