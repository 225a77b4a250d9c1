"""Contract 1 over the family (float64): every pair of rule, rates, learned numbers, norm, head,
frozen parts, objective, encoder, support batches, kept states and kept activations occurs in a
case."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from helpers_meta import build, episodes, flat, relative_error
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from raymaml.config.norm import BY_THE_BATCH
from raymaml.kernels.library import Kernels, usable
from raymaml.meta.inner_loop import unroll
from raymaml.meta.learner import MetaLearner
from raymaml.meta.objective import query_weights
from raymaml.models.closed_form import ConvNet4Pass
from raymaml.models.policies import POLICIES
from raymaml.types import Buffers, Episode, Params

STEPS, OUTER_STEP = 3, 1
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05},
    "momentum and decay": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.05, "head_lr": 0.2},
    # epsilons of the size of gradients: with smaller ones, the gradients that are zero up to
    # rounding (of a bias in front of a batch norm) turn rounding into steps
    "rmsprop": {"rule": "rmsprop", "lr": 0.01, "rule_args": {"beta": 0.8, "epsilon": 1e-3}},
    "adam": {"rule": "adam", "lr": 0.01, "rule_args": {"beta1": 0.8, "epsilon": 1e-2}},
    "alfa": {"rule": "alfa", "lr": 0.05, "rule_args": {"decay": 0.5}},
    "own": {
        "rule": "helpers_rules:Damped",
        "lr": 0.05,
        "rule_args": {"memory": 0.3, "damping": 1.0},
    },
}
NUMBERS = {
    "sgd": ("momentum",),
    "momentum and decay": ("momentum",),
    "rmsprop": ("beta", "epsilon"),
    "adam": ("beta1", "beta2", "epsilon"),
    "alfa": ("decay",),
    "own": ("memory", "damping"),
}
NORMS: dict[str, Any] = {
    **{name: name for name in POLICIES},
    "affine": {"policy": "transductive", "per_step": "affine"},
    "both": {"policy": "running", "per_step": "both"},
    "context affine": {"policy": "context", "per_step": "affine"},
    "no scale": {"policy": "transductive", "scale": False},
}
FROZEN = {"none": (), "ANIL": ("encoder",), "BOIL": ("head",), "one layer": ("encoder.*1",)}
CHOICES: dict[str, list[Any]] = {
    "norm": list(NORMS),
    "rule": list(RULES),
    "rates": ["fixed", "shared", "per_tensor", "per_tensor_per_step", "per_parameter"],
    "head": ["learned", "zero", "shared", "prototypes"],
    "frozen": list(FROZEN),
    "learned": ["none", "all"],
    "objective": ["last", "multi_step"],
    "encoder": ["convnet4", "resnet10", "kernels"],
    "support": ["all", "some"],
    "keep_every": [1, 2],
    "tape_memory": [0, "auto"],
}
AT_ZERO = {"output.weight", "hidden.bias"}
"""Of ALFA; a bias of 0 stands at the kink of the ReLU where all means are 0."""
Pair = frozenset[tuple[str, Any]]
SAYS_NOTHING: set[Pair] = {
    frozenset({("head", head), ("frozen", "BOIL")}) for head in ("zero", "shared")
}
"""A head that stays at equal rows: so are all logits of an image, and all gradients are 0."""


def all_pairs() -> dict[Pair, None]:
    pairs = [
        frozenset({(a, one), (b, other)})
        for a, b in combinations(CHOICES, 2)
        for one, other in product(CHOICES[a], CHOICES[b])
    ]
    return {pair: None for pair in pairs if pair not in SAYS_NOTHING}


def covering_array() -> Iterator[dict[str, Any]]:
    """Yield cases until every pair has occurred, each built around a pair that has not."""
    missing, chance = all_pairs(), random.Random(0)
    while missing:
        case = dict(sorted(next(iter(missing)), key=lambda chosen: list(CHOICES).index(chosen[0])))
        for key in [key for key in CHOICES if key not in case]:
            values = chance.sample(CHOICES[key], len(CHOICES[key]))
            case[key] = max(values, key=lambda value, k=key, c=case: gain(k, value, c, missing))
        for pair in combinations(case.items(), 2):
            missing.pop(frozenset(pair), None)
        yield case


def gain(key: str, value: Any, case: dict[str, Any], missing: Collection[Pair]) -> int:
    """Count the missing pairs that a value would add to a case; -1 if it says nothing then."""
    pairs = [frozenset({(key, value), chosen}) for chosen in case.items()]
    return sum(pair in missing for pair in pairs) if SAYS_NOTHING.isdisjoint(pairs) else -1


CASES = list(covering_array())


def test_every_legal_pair_occurs() -> None:
    seen = {frozenset(pair) for case in CASES for pair in combinations(case.items(), 2)}
    assert seen == set(all_pairs())
    assert len(NORMS) * len(RULES) <= len(CASES) < 2 * len(NORMS) * len(RULES)


def made(case: dict[str, Any], gradient: str) -> MetaLearner:
    inner = {
        "num_steps": STEPS,
        "frozen": FROZEN[case["frozen"]],
        "gradient": gradient,
        "learned": NUMBERS[case["rule"]] if case["learned"] == "all" else (),
        "support_batch_size": 4 if case["support"] == "some" else None,
        "keep_every": case["keep_every"] if gradient in {"checkpointed", "mixed_mode"} else 1,
        "tape_memory": case["tape_memory"],
        **RULES[case["rule"]],
        "rates": case["rates"],
    }
    if case["rates"] == "per_parameter":
        lr = inner["lr"]
        inner["lr_range"] = [lr / 2, 3 * lr / 2]
    if case["objective"] == "multi_step":  # the weights 1/6, 1/6, 4/6
        inner["multi_step_loss"] = {"num_outer_steps": 2, "num_stages": 2}
    learner = build(case["encoder"], NORMS[case["norm"]], case["head"], **inner)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from where numbers of a kind are equal, or network weights zero
        for name, value in learner.learned.items():
            drawn = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            value.add_(0.1 * drawn * (1 if name in AT_ZERO else -value))
    return learner


@torch.enable_grad()
def judged(
    learner: MetaLearner, episode: Episode, moments: list[Buffers] | None = None
) -> tuple[float, list[Buffers]]:
    """Return the objective without a graph, by given accumulated moments or those of the way."""
    torch.manual_seed(0)
    adaptation, total, used = learner.adaptation(episode, learner.inner), 0.0, []
    for fast in unroll(adaptation, create_graph=False):
        used.append(fast.buffers if moments is None else moments[fast.steps])
        if weight := query_weights(learner.inner, OUTER_STEP)[fast.steps]:
            with torch.no_grad():
                loss, _ = adaptation.query(replace(fast, buffers=used[-1]))
                total += weight * loss.item()
    return total, used


@torch.no_grad()
def slope(learner: MetaLearner, episode: Episode, moments: Any, along: Tensor) -> float:
    """Difference over the step ``along`` there and back; moments are constants of the gradient."""
    before, ends = flat(learner.params), []
    for sign in (1, -1):
        vector_to_parameters(before + sign * along, learner.params.values())
        ends.append(judged(learner, episode, moments)[0])
    vector_to_parameters(before, learner.params.values())
    return (ends[0] - ends[1]) / 2


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gains an entry by each Hessian product in closed form."""
    seen: list[str] = []
    product = ConvNet4Pass.product

    def counted(self: ConvNet4Pass, direction: Params) -> Params:
        seen.append("product")
        return product(self, direction)

    monkeypatch.setattr(ConvNet4Pass, "product", counted)
    return seen


def by_kernels(case: dict[str, Any]) -> bool:
    norm = NORMS[case["norm"]]
    policy = norm if isinstance(norm, str) else norm["policy"]
    has_kernels = isinstance(usable(torch.float64), Kernels)
    return has_kernels and case["encoder"] == "kernels" and policy in BY_THE_BATCH


def gradient(learner: MetaLearner, episode: Episode) -> Any:
    torch.manual_seed(0)
    return learner.episode_gradient(episode, OUTER_STEP)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_all_ways_to_the_gradient_agree(case: dict[str, Any], products: list[str]) -> None:
    batch, learner = episodes(2), made(case, "unrolled")
    exact = gradient(learner, batch[0])
    for method in ("checkpointed", "mixed_mode"):
        other = made(case, method)
        found = gradient(other, batch[0])
        assert found.grads.keys() == exact.grads.keys()
        assert relative_error(flat(found.grads), flat(exact.grads)) < 1e-10, method
        for name in learner.learned:  # small beside the rest, so looked at alone
            one, two = found.grads[f"rule.{name}"], exact.grads[f"rule.{name}"]
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=f"{method} {name}")
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(found.logits, exact.logits, rtol=1e-11, atol=1e-11)
        for name, moments in exact.buffers.items():
            torch.testing.assert_close(found.buffers[name], moments, rtol=1e-11, atol=1e-11)
        assert len(products) == (STEPS if method == "mixed_mode" and by_kernels(case) else 0)

    grads = flat({name: exact.grads[name] for name in learner.params})
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(grads.shape, generator=generator, dtype=grads.dtype)
    _, moments = judged(learner, batch[0])
    for direction in (grads / grads.norm() * drawn.norm(), drawn):
        wanted, limit = (grads @ direction).item(), 1e-6 * (grads.norm() * drawn.norm()).item()
        errors = []
        # small, so that no maximum or sign changes its place; the best of four lengths
        for size in (1e-8, 1e-7, 1e-9, 1e-6):
            found = slope(learner, batch[0], moments, size * direction) / size
            errors.append(abs(found - wanted) / limit)
            if errors[-1] < 1:
                break
        assert min(errors) < 1, errors


class Held:
    """A tensor that a graph holds; counts bytes while it lives."""

    now = most = 0

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()  # a result of a node must not hold the node
        Held.now += value.nbytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.value.nbytes


@pytest.mark.parametrize("rule", RULES)
def test_graphs_hold_as_much_for_16_steps_as_for_4(rule: str) -> None:
    """They are of one step at a time; the plain graph is of all."""

    def growth(method: str) -> int:
        most = []
        for num_steps in (4, 16):
            learner = build("convnet4", num_steps=num_steps, gradient=method, **RULES[rule])
            Held.now = Held.most = 0
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.value):
                gradient(learner, episodes(1)[0])
            assert Held.now == 0
            most.append(Held.most)
        assert most[0] > 0
        return most[1] - most[0]

    plain = growth("unrolled")
    assert plain > 2_000_000  # bytes, of 12 steps
    assert growth("checkpointed") == 0
    assert growth("mixed_mode") == 0
