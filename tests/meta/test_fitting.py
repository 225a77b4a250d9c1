"""Models that a learner does not take are refused in words that name the part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_meta import WAYS, Graph, episodes
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.meta.learner import MetaLearner


def changed(change: Callable[[Graph], Any]) -> Graph:
    model = Graph()
    model.register_buffer("seen", torch.zeros(()))
    change(model)
    return model


def bound(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight


def closed_over(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ weight


def holding(hold: Callable[[Graph], Any]) -> Callable[[], Graph]:
    """A model with an attribute ``a.holds``."""
    return lambda: changed(lambda model: setattr(model.a, "holds", hold(model)))


def with_part(name: str, part: Callable[[Graph], Any]) -> Callable[[], Graph]:
    return lambda: changed(lambda model: setattr(model, name, part(model)))


def inferred(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


IN_AN_OBJECT = r"model: a\.holds hold modules, parameters or buffers in an object"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a module of its own": (
        holding(lambda _: SimpleNamespace(norm=nn.Linear(3, 3))),
        IN_AN_OBJECT,
    ),
    "a parameter": (holding(lambda model: SimpleNamespace(w=model.b.weight)), IN_AN_OBJECT),
    "a list of objects": (
        holding(lambda model: [{"x": SimpleNamespace(deep=[model.b.weight])}]),
        IN_AN_OBJECT,
    ),
    "a function": (holding(lambda model: closed_over(model.b.weight)), IN_AN_OBJECT),
    "a partial": (holding(lambda model: partial(bound, model.b.weight)), IN_AN_OBJECT),
    "a buffer": (holding(lambda model: SimpleNamespace(seen=model.seen)), IN_AN_OBJECT),
    "a head elsewhere": (
        with_part("net", lambda model: nn.Sequential(model.a, model.head)),
        r"head: its parameters are net\.1\.weight, net\.1\.bias too",
    ),
    "a shared head": (
        with_part("head_start", lambda _: "shared"),
        r"head: is shared, and head\.weight has 3 row",
    ),
    "no shapes": (
        with_part("a", lambda _: nn.LazyLinear(3)),
        r"a\.weight, a\.bias have no shape .* call the model once",
    ),
    "a script": (
        with_part("b", lambda _: torch.jit.script(nn.Linear(3, 3))),
        r"model: b is TorchScript, .* give the nn\.Module",
    ),
    "a trace": (
        with_part("b", lambda _: torch.jit.trace(nn.Linear(3, 3), torch.ones(3))),
        r"model: b is TorchScript, .* give the nn\.Module",
    ),
    "a norm in a plain list": (
        with_part("stages", lambda model: [(model.a, nn.BatchNorm1d(3))]),
        r"model: stages\.0\.1 keep moments",
    ),
    "inference mode": (
        lambda: inferred(Graph),
        r"model: a\.weight, .* were made in torch\.inference_mode.* build the model outside of it",
    ),
    "a buffer of inference mode": (
        with_part("seen", lambda _: inferred(lambda: torch.zeros(()))),
        r"model: seen were made in torch\.inference_mode",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_model_that_does_not_fit_is_refused_by_name(kind: str) -> None:
    make, says = REFUSED[kind]
    model = make()
    with pytest.raises(UserError, match=says):
        MetaLearner(model, InnerConfig())


def test_objects_that_lead_to_submodules_alone_are_allowed() -> None:
    """A pass gives its tensors to the module itself, wherever it is held."""
    model = Graph().double()
    model.options = SimpleNamespace(width=3, owner=model, layer=model.b, values=[torch.ones(3)])
    model.call, model.short = model.b.forward, lambda x: model.b(x) + 1
    assert MetaLearner(model, InnerConfig()).predict(episodes(size=4)).shape == (1, 9, WAYS)
