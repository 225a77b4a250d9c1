"""Update rules of the inner loop by name, and the rates that they take their steps with."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.layers import row_of_step
from raymaml.meta.rules.adam import Adam
from raymaml.meta.rules.alfa import ALFA
from raymaml.meta.rules.rmsprop import RMSProp
from raymaml.meta.rules.rule import Meta, Rule
from raymaml.meta.rules.sgd import SGD
from raymaml.passes.own_rules import named, require_rule
from raymaml.seeding import fold_in
from raymaml.types import Params

RULES: dict[str, type[Rule]] = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam, "alfa": ALFA}
"""The rules of ``inner.rule`` by name."""
RATE_SHAPES: dict[str, Callable[[torch.Size, int], tuple[int, ...]]] = {
    "per_tensor": lambda _shape, _num_steps: (),
    "per_tensor_per_step": lambda _shape, num_steps: (num_steps,),
    "per_parameter": lambda shape, _num_steps: tuple(shape),
}
"""By ``inner.rates``: (shape of a parameter, inner steps of training) -> shape of its rates."""


def build_rule(inner: InnerConfig) -> Rule:
    """Return the update rule with its numbers.

    Raises:
        UserError: an own rule cannot be imported or built, is no ``raymaml.Rule``, or has not the
            numbers that the config names.
    """
    kind = RULES.get(inner.rule) or _own_rule(inner.rule)
    args = {"momentum": inner.momentum} if kind is SGD else inner.rule_args
    if strange := {*args, *inner.learned} - set(kind.numbers):
        raise UserError(
            f"inner.rule: {inner.rule} has no {', '.join(sorted(strange))}",
            remedy=f"its numbers are {', '.join(kind.numbers) or 'none'}",
        )
    with named(f"{inner.rule} cannot be built"):
        return kind(args, inner.learned)


def _own_rule(path: str) -> type[Rule]:
    module, _, name = path.partition(":")
    with named(f"{path} cannot be imported"):
        found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise UserError(f"inner.rule: {path} is {found!r}, and no subclass of raymaml.Rule")
    return found


def learning_rate(name: str, inner: InnerConfig, head: str = "head") -> float:
    """Return the rate that the config gives the parameter ``name``; ``head`` names the head."""
    return inner.lr if inner.head_lr is None or not name.startswith(f"{head}.") else inner.head_lr


def learned_tensors(inner: InnerConfig, params: Params, head: str, seed: int) -> Params:
    """Return the tensors that the rule learns, by name, as they start.

    Args:
        inner: the inner loop of training.
        params: the parameters that adapt, of an episode with one class where the head has no rows
            of its own.
        head: name of the head.
        seed: decides rates within ``inner.lr_range``, and the rule's own draws.

    Raises:
        UserError: a rule of the user's own fails, or does not return all that it got.
    """
    rule, steps = build_rule(inner), max(inner.num_steps, 1)
    some = next(iter(params.values()), torch.zeros(()))
    found = {name: some.new_tensor(value) for name, value in rule.learned.items()}
    if params:
        with named(f"{inner.rule} gives no tensors"):
            found |= rule.tensors(params, steps, inner.lr, fold_in(seed, "rule"))
    for name, value in params.items() if inner.rates != "fixed" else ():
        shape = () if inner.rates == "shared" else RATE_SHAPES[inner.rates](value.shape, steps)
        key, lr = _key(name, inner, head), learning_rate(name, inner, head)
        if key not in found:
            found[key] = _rates(shape, lr, inner, fold_in(seed, key)).to(some)
    if params and inner.rule not in RULES:
        meta = numbers_at(inner, rule, found, params, head=head, step=0)
        require_rule(inner.rule, rule.init, rule.update, params, meta)
    return found


def _rates(shape: tuple[int, ...], lr: float, inner: InnerConfig, seed: int) -> Tensor:
    if inner.lr_range is None:
        return torch.full(shape, lr, dtype=torch.float64)  # of a model in float64 too
    low, high = inner.lr_range
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _key(name: str, inner: InnerConfig, head: str) -> str:
    if inner.rates != "shared":
        return f"lr.{name}"
    return "lr" if inner.head_lr is None or not name.startswith(f"{head}.") else "head_lr"


def numbers_at(
    inner: InnerConfig, rule: Rule, learned: Params, params: Params, *, head: str, step: int
) -> Meta:
    """Return the numbers of ``rule`` and the rates of ``params`` in the inner step ``step``.

    After the last step of training, the rates of each step stay as they are there.
    """
    rates: dict[str, float | Tensor] = {}
    for name in params:
        rate = learned.get(_key(name, inner, head))
        if rate is not None and inner.rates == "per_tensor_per_step":
            rate = rate[row_of_step(rate, step)]
        rates[f"lr.{name}"] = learning_rate(name, inner, head) if rate is None else rate
    return {**rule.fixed, **learned, **rates}
