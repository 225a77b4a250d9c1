"""Compute cases of the MAML family with raymaml, and compare all that they expect.

    python tests/meta/family_cases.py FOLDER...

A folder is a case, or holds cases; ``../shared/family/README.md`` describes their files. A line for
each case and precision gives the error of each kind of number: the norm of the difference over the
norm of what is expected, of all numbers of a kind as one vector. Exact gradients are computed by
all three methods, and the largest error counts. The exit code is 1 where an error exceeds
``BOUNDS``, or where a case holds a method or a number that this file does not know.

Some numbers are no better in float32 than their inputs: a derivative in Adam's epsilon hangs on
gradients near 0, and ReLU networks jump. An error in float32 above its bound is rounding if the
exact number moves as far where the weights move by one part in 2**20 (a support gradient in float32
is off by as much); a line says so.

The names of ``adapted/`` are the parameters that adapt. All formulas are raymaml's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_family import MOMENTUM, RULES, Case, UnknownError, episodes, loss_fn, network
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raymaml import Episode, InnerConfig, MetaLearner
from raymaml.config.inner import MultiStepLoss
from raymaml.config.model import OuterConfig
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.objective import importance
from raymaml.models.norm import TransductiveNorm2d
from raymaml.training.optimizer import build_optimizer, update

BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-4}
MOVES = 4
"""Random moves of the weights that show what rounding to float32 does to a number."""
CONVERGED = 200
"""Conjugate gradient steps after which the system counts as solved."""


def rates(case: Case) -> str:
    """Return ``inner.rates``, by the shapes of the rates."""
    found = case.under("hyper/rates")
    if not found:
        return "fixed" if case.gradients[0] in ("reptile", "implicit") else "shared"
    shapes = {
        "per_tensor": lambda name: (),
        "per_parameter": lambda name: case.initial[name].shape,
        "per_tensor_per_step": lambda name: (case.steps,),
    }
    for kind, shape in shapes.items():
        if all(value.shape == shape(name) for name, value in found.items()):
            return kind
    raise UnknownError(f"rates of shapes {sorted({value.shape for value in found.values()})}")


def importance_at(case: Case) -> tuple[MultiStepLoss | None, int | None]:
    """Return the multi-step loss and the outer step at which raymaml has a case's importance."""
    wanted = case.importance
    if wanted is None:
        return None, None
    for stages in range(1, 101):
        several = MultiStepLoss(num_outer_steps=stages, num_stages=stages)
        for stage in range(stages):
            if np.allclose(importance(case.steps, stage, several), wanted, rtol=1e-9, atol=0):
                return several, stage
    raise UnknownError(f"importance {wanted.tolist()} is in no schedule of up to 100 stages")


def schedule(case: Case) -> Tensor:
    """Return the importance by stage of raymaml, in as many stages as the first two rows show."""
    rows = case.expected["importance_by_epoch"]
    fallen = case.steps * (rows[0, 0] - rows[1, 0])
    stages = round(1 / fallen) if fallen else 1
    several = MultiStepLoss(num_outer_steps=stages, num_stages=stages)
    found = [importance(case.steps, stage, several) for stage in range(len(rows))]
    return torch.tensor(found, dtype=torch.float64)


def inner_config(case: Case, gradient: str) -> tuple[InnerConfig, int | None]:
    """Return the section ``inner``, and the outer step of the case."""
    adapted = case.under("adapted")
    learned = [n for n in ("momentum", *RULES[case.rule]) if f"grad_{n}" in case.expected]
    numbers = {name: case.number(name) for name in RULES[case.rule]}
    options = {
        "lr": case.number("lr", "inner_lr"),
        "momentum": case.number("momentum"),
        "weight_decay": case.number("weight_decay"),
    }
    if gradient == "implicit":
        options["proximal"] = case.number("lambda", "proximal_lambda")
        options["cg_steps"] = int(case.config["cg_steps"])
    several, outer_step = importance_at(case)
    inner = InnerConfig(
        num_steps=case.steps,
        rule=case.rule,
        rule_args={name: value for name, value in numbers.items() if value is not None},
        rates=rates(case),
        learned=learned,
        gradient=gradient,
        frozen=[n for n in case.initial if not n.startswith("hyper/") and n not in adapted],
        multi_step_loss=several,
        **{name: value for name, value in options.items() if value is not None},
    )
    return inner, outer_step


def learner_of(case: Case, dtype: torch.dtype, inner: InnerConfig) -> MetaLearner:
    """Return the learner of a case, with its rates and numbers of the rule."""
    model = network(case, dtype)
    for name, parameter in model.named_parameters():  # by reptile nothing else can learn
        parameter.requires_grad_(inner.gradient != "reptile" or name in case.under("adapted"))
    test = inner.model_copy(update={"num_steps": case.reported})
    head = list(dict(model.named_children()))[-1]
    learner = MetaLearner(model, inner, head=head, loss_fn=loss_fn(case), test_inner=test)
    with torch.no_grad():
        for name, value in case.under("hyper/rates").items():
            learner.params[f"rule.lr.{name}"].copy_(torch.from_numpy(value))
    return learner


def computed(case: Case, dtype: torch.dtype, gradient: str) -> dict[str, Tensor]:
    """Compute all that raymaml can of a case, by the names of ``expected.npz``."""
    inner, outer_step = inner_config(case, gradient)
    learner, batch = learner_of(case, dtype, inner), episodes(case, dtype)
    results = [learner.episode_gradient(episode, outer_step) for episode in batch]
    grads = {n: torch.stack([r.grads[n] for r in results]).mean(0) for n in results[0].grads}
    if gradient == "reptile":  # raymaml's is over the rate, that of the cases is not
        grads = {name: inner.lr * value for name, value in grads.items()}
        still = dict(learner.model.named_parameters()).items()
        grads = {name: torch.zeros_like(value) for name, value in still} | grads
    found = {"loss": torch.stack([result.loss for result in results]).mean()}
    found |= {_key(name): value for name, value in grads.items()}
    found |= by_step(case, learner, batch)
    found["grad_importance"] = found["query_loss"].mean(0)
    if "importance_by_epoch" in case.expected:
        found["importance_by_epoch"] = schedule(case)
    if any(key.startswith("running/") for key in case.expected):
        found |= moments(case, learner, batch)
    if gradient == "implicit":
        found |= implicitly(case, dtype, inner, found)
    start = dict(learner.model.named_parameters()) | learner.params
    start = {name: value.detach().clone() for name, value in start.items()}
    for kind, settings in steps_of_the_outer_loop(case).items():
        moved = {name: p.clone().requires_grad_() for name, p in start.items()}
        outer = OuterConfig(num_steps=1, optimizer="sgd", **settings)
        down = {name: grads[name].clone() for name in moved}  # which it clips in place
        update(build_optimizer(outer, moved), outer, moved, down, 0)
        for name, value in moved.items():
            now = value.detach()
            found[f"{kind}/{name}"] = now if kind == "updated" else start[name] - now
    return found


def steps_of_the_outer_loop(case: Case) -> dict[str, dict[str, float]]:
    """Return the kinds of numbers that a step of the outer loop gives, and its settings."""
    found = {}
    if (rate := case.number("outer_lr")) is not None:
        found["updated"] = {"lr": rate}
    if (bound := case.number("clip")) is not None:
        found["clipped"] = {"lr": 1.0, "clip_value": abs(bound)}
    return found


def _key(name: str) -> str:
    if not name.startswith("rule."):
        return f"grad/{name}"
    kind, _, tensor = name.removeprefix("rule.").partition(".")
    return f"grad_rates/{tensor}" if tensor else f"grad_{kind}"


def by_step(case: Case, learner: MetaLearner, batch: list[Episode]) -> dict[str, Tensor]:
    """Return the losses and outputs by inner step, and the adapted weights."""
    plain, losses, states = learner.loss_fn, [], []

    def recorded(outputs: Tensor, targets: Tensor) -> Tensor:
        losses.append(plain(outputs, targets).detach())
        return plain(outputs, targets)

    learner.loss_fn = recorded
    for episode in batch:
        *_, fast = learner.adapt(episode)
        states.append(fast.params)
    learner.loss_fn = plain
    outputs = torch.stack([learner.logits_by_step(episode)[1:] for episode in batch])
    query = [[plain(o, e.query_y) for o in rows] for rows, e in zip(outputs, batch, strict=True)]
    adapted = {n: torch.stack([state[n].detach() for state in states]) for n in states[0]}
    return {
        "support_loss": torch.stack(losses).reshape(len(batch), -1),
        "query_loss": torch.tensor(query, dtype=outputs.dtype),
        "query_outputs": outputs,
    } | {f"adapted/{name}": value for name, value in adapted.items()}


def moments(case: Case, learner: MetaLearner, batch: list[Episode]) -> dict[str, Tensor]:
    """Return the running moments by step that PyTorch's batch norm would keep of these passes.

    raymaml's ``transductive`` keeps none, since nothing reads them.
    """
    layers = {n: m for n, m in learner.model.named_modules() if isinstance(m, TransductiveNorm2d)}
    kept: dict[str, Tensor] = {}

    def watched(name: str, layer: TransductiveNorm2d, inputs: tuple[Tensor, ...]) -> None:
        x, row = inputs[0].detach(), layer.inner_step
        last = layer.current_pass == "support" or row == case.steps - 1
        if last or case.importance is not None:  # the other query passes train nothing
            mean, var = kept[f"{name}.mean"][row], kept[f"{name}.var"][row]
            F.batch_norm(x, mean, var, training=True, momentum=MOMENTUM)

    hooks = [m.register_forward_pre_hook(partial(watched, n)) for n, m in layers.items()]
    for name, layer in layers.items():
        shape = (case.steps, layer.bias.shape[-1])
        kept[f"{name}.mean"] = torch.zeros(shape, dtype=layer.bias.dtype)
        kept[f"{name}.var"] = torch.ones(shape, dtype=layer.bias.dtype)
    for episode in batch:
        states = learner.adapt(episode)
        next(states)
        for fast in states:
            learner.query_logits(fast, episode)
    for hook in hooks:
        hook.remove()
    return {f"running/{name}": value for name, value in kept.items()}


def implicitly(
    case: Case, dtype: torch.dtype, inner: InnerConfig, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what belongs to the implicit gradient alone, from the adapted weights ``found``."""

    def results(learner: MetaLearner, **changes: Any) -> list[EpisodeGradient]:
        learner.inner = inner.model_copy(update=changes)
        return [learner.episode_gradient(episode) for episode in episodes(case, dtype)]

    learner = learner_of(case, dtype, inner)
    solved = [result.grads for result in results(learner, cg_steps=CONVERGED)]
    by_steps = [results(learner, cg_steps=k) for k in range(1, inner.cg_steps + 1)]
    residuals = [[result.metrics["cg_residual"] for result in each] for each in by_steps]
    more = {"cg_residual": torch.tensor(residuals, dtype=dtype).T}
    plain = {"gradient": "first_order", "proximal": None, "num_steps": 0}
    queries = []
    for number in range(len(solved)):
        with torch.no_grad():
            for name, place in learner.model.named_parameters():
                place.copy_(found[f"adapted/{name}"][number])
        queries.append(results(learner, **plain)[number].grads)
    for name in solved[0]:
        more[f"grad_solved_exactly/{name}"] = torch.stack([each[name] for each in solved]).mean(0)
        more[f"query_gradient/{name}"] = torch.stack([each[name] for each in queries])
    return more


def errors(case: Case, found: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each kind of number that a case expects."""
    squares: dict[str, NDArray[Any]] = {}
    for key, wanted in case.expected.items():
        if key not in found:
            raise UnknownError(f"expected.npz: {key} is not known, or not for such a case")
        value = found[key].double().numpy()
        if value.ndim == wanted.ndim + 1 and key in ("query_loss", "query_outputs"):
            value = value[:, -1]  # after the last step alone
        if value.shape != wanted.shape:
            raise UnknownError(f"expected.npz: {key} has shape {wanted.shape}, here {value.shape}")
        sums = np.array([((value - wanted) ** 2).sum(), (wanted**2).sum()])
        squares[key.partition("/")[0]] = squares.get(key.partition("/")[0], 0) + sums
    return {kind: math.sqrt(a / (b or 1)) for kind, (a, b) in squares.items()}


def by_rounding(case: Case, gradient: str) -> dict[str, float]:
    """Return how far the exact numbers move where weights move as if in float32, by kind."""
    moves = [computed(case.moved(seed), torch.float64, gradient) for seed in range(MOVES)]
    moved = [errors(case, found) for found in moves]
    return {kind: max(each[kind] for each in moved) for kind in moved[0]}


def checked(name: str, case: Case, dtype: torch.dtype) -> bool:
    """Print the line of a case in one precision; return whether all is within its bound."""
    worst: dict[str, tuple[float, str]] = {}
    for gradient in case.gradients:
        for kind, error in errors(case, computed(case, dtype, gradient)).items():
            if not error <= worst.get(kind, (-1.0, ""))[0]:  # also of nan
                worst[kind] = (error, gradient)
    over = {kind: pair for kind, pair in worst.items() if not pair[0] <= BOUNDS[dtype]}
    moves = by_rounding(case, case.gradients[-1]) if over and dtype == torch.float32 else {}
    failed = [kind for kind, (error, _) in over.items() if not error <= moves.get(kind, 0)]
    text = "  ".join(f"{kind} {error:.0e}" for kind, (error, _) in worst.items())
    state = "OVER" if failed else "ok but for rounding" if over else "ok"
    print(f"{name}  {str(dtype).removeprefix('torch.')}  {state}  {text}")
    for kind, (error, gradient) in over.items():
        rounded = f"; rounded weights move it by {moves[kind]:.2e}" if moves else ""
        print(f"  {kind}: {error:.2e} by {gradient}, more than {BOUNDS[dtype]:.0e}{rounded}")
    return not failed


def cases_in(folders: list[str]) -> Iterator[Path]:
    """Yield the folders that are cases, and those in folders that are none."""
    for folder in map(Path, folders):
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        yield from inside if inside and not (folder / "config.yaml").exists() else [folder]


def main(folders: list[str]) -> int:
    """Check all cases; return the exit code."""
    torch.set_num_threads(1)
    outcomes = []
    if not folders:
        print("no case: give folders")
    for folder in cases_in(folders):
        try:
            case = Case.read(folder)
            outcomes += [checked(folder.name, case, dtype) for dtype in BOUNDS]
        except Exception as error:  # of raymaml or of the files: the other cases run all the same
            print(f"{folder.name}  FAILED  {type(error).__name__}: {error}")
            outcomes.append(False)
    return int(not outcomes or not all(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
