"""Other libraries, and the vectors of the reference where they are at hand (float32, one thread).

Through ``raymaml.convert`` and the public API, as a user who moves over would.

Some images lie so close to a kink (a ReLU, the maximum of a pool) that the rounding of a CPU's
kernels decides the side, and the outcome jumps. Measured on one CPU: when each weight moves by up
to one part in 2**23, gradients of ``firstorder`` are off by 9e-4, 3e-4 or 2e-6, and nothing
between. So a case with such images also passes if one of ``ROUNDINGS`` such moves gives the
reference's numbers to 1e-5, ten times as close as the contract asks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers_bench import tiny
from helpers_data import SHARED
from numpy.typing import NDArray

from raymaml import EpisodeBatch, MetaLearner
from raymaml.bench.contenders import EXACT_METHODS, PHASES, Contender, why_not
from raymaml.convert import from_reference, reference_names
from raymaml.models.norm import RunningNorm2d
from raymaml.passes.moments import restored

GOLDEN = SHARED / "golden"
CASES = [
    "convnet4-transductive",
    "convnet4-firstorder",
    "convnet4-episodic-momentum",
    "convnet4-running",
    "resnet12-transductive",
]
WITH_KINKS = {
    *("convnet4-transductive", "convnet4-firstorder", "convnet4-running"),
    "convnet4-episodic-momentum",  # by the kernels: 2.7e-4, and 4e-6 to 9e-6 by any such move
}
ROUNDINGS = 16
EXAMPLE = {
    "dataset": "meta-mini-imagenet",
    "optimizer": "adam",
    "optimizer_args": {"lr": 0.001},
    "epoch": 1,
}
Case = tuple[MetaLearner, EpisodeBatch, dict[str, NDArray[Any]]]


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def recipe(name: str, shape: torch.Size) -> torch.Tensor:
    """The weights of the ResNet case, by their name in the reference."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) >= 2:
        values = generator.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif name.endswith("weight"):
        values = generator.uniform(0.5, 1.5, shape)
    else:
        values = generator.uniform(-0.2, 0.2, shape)
    return torch.from_numpy(values.astype(np.float32))


def load(name: str) -> Case:
    folder = GOLDEN / name
    files = [folder / file for file in ("seed_config.yaml", "episodes.npz", "expected.npz")]
    for path in files:
        if not path.is_file():
            pytest.skip(f"{path} is not there")
    config = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    sizes = {key: config.pop(key) for key in ("n_way", "n_shot", "n_query", "image_size")}
    config |= EXAMPLE | {"train": {**sizes, "normalization": False}}
    checkpoint = folder / "checkpoint.pth"
    learner = from_reference(config, checkpoint if checkpoint.is_file() else None)
    if not checkpoint.is_file():
        names = reference_names(learner)
        with torch.no_grad():
            for ours, parameter in learner.model.named_parameters():
                parameter.copy_(recipe(names[ours], parameter.shape))
    found = {key: torch.from_numpy(value) for key, value in arrays(files[1]).items()}
    batch = EpisodeBatch(
        support_x=found["support_images"].float() / 255,
        support_y=found["support_labels"],
        query_x=found["query_images"].float() / 255,
        query_y=found["query_labels"],
    )
    return learner, batch, arrays(files[2])


class MovedNorm2d(RunningNorm2d):
    """``running``, whose training query pass is differentiated with the moments ``last``."""

    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, window: int = 1) -> torch.Tensor:
        normalised = super().forward(x, window)
        if self.last is None or not self.training or self.current_pass != "query":
            return normalised
        differentiated = self._by(x, *self.last, window)
        return differentiated + (normalised - differentiated).detach()


def with_moments_moved_in_place(learner: MetaLearner, batch: EpisodeBatch) -> None:
    """Let the learner have the reference's gradient of this batch."""
    inner, model = learner.inner, learner.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RunningNorm2d)}
    with restored(model):
        learner.inner = inner.model_copy(update={"gradient": "first_order"})
        learner.meta_gradient(batch, update_moments=True)
        last = {name: (layer.mean.clone(), layer.var.clone()) for name, layer in layers.items()}
    for name, layer in layers.items():
        new = MovedNorm2d(layer.weight.numel(), layer.eps, layer.momentum)
        new.weight, new.bias, new.mean, new.var = layer.weight, layer.bias, layer.mean, layer.var
        new.last = last[name]
        model.set_submodule(name, new)
    learner.inner = inner


def gradient_error(
    learner: MetaLearner, grads: Any, expected: Any, *, in_short: bool = False
) -> float:
    """Relative error over the whole gradient; ``in_short`` over norms and first 63 entries."""
    wanted = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    names = reference_names(learner)
    assert {names[name] for name in grads} == set(wanted)
    difference = length = 0.0
    for name, grad in grads.items():
        found, value = grad.numpy(), wanted[names[name]]
        if in_short:
            found = np.concatenate([[np.linalg.norm(found)], found.ravel()[:63]])
        difference += ((found - value) ** 2).sum()
        length += (value**2).sum()
    return math.sqrt(difference / length)


def rounded_otherwise(learner: MetaLearner, seed: int) -> None:
    """Move each weight by up to one part in 2**23, its rounding; seed 0 leaves them alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in learner.model.parameters():
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            weight.mul_(1 + noise * torch.finfo(weight.dtype).eps * 2 * (seed > 0))


def require_small(name: str, error: Callable[[int], float]) -> None:
    """Check the error of a case, a function of the seed of ``rounded_otherwise``."""
    errors = [error(0)]
    if errors[0] < 1e-4:
        return
    for seed in range(1, ROUNDINGS if name in WITH_KINKS else 1):
        errors.append(error(seed))
        if errors[-1] < 1e-5:
            return
    pytest.fail(f"relative errors: {errors}")


def largest_error(found: torch.Tensor, expected: NDArray[Any]) -> float:
    return float(np.abs(found.numpy() - expected).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode"])
def test_logits_loss_and_meta_gradient_are_the_references(name: str, gradient: str) -> None:
    def error(seed: int) -> float:
        learner, batch, expected = load(name)
        if learner.inner.gradient == "unrolled":
            learner.inner = learner.inner.model_copy(update={"gradient": gradient})
        rounded_otherwise(learner, seed)
        with_moments_moved_in_place(learner, batch)
        loss, logits, grads = learner.meta_gradient(batch)
        assert loss.item() == pytest.approx(float(expected["train_loss"]), rel=1e-5)
        assert largest_error(logits, expected["train_logits"]) < 1e-4
        return gradient_error(learner, grads, expected, in_short=name.startswith("resnet"))

    require_small(name, error)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_the_references(name: str) -> None:
    def error(seed: int) -> float:
        learner, batch, expected = load(name)
        rounded_otherwise(learner, seed)
        return largest_error(learner.predict(batch), expected["eval_logits"])

    require_small(name, error)


@pytest.mark.parametrize(
    ("library", "inner"),
    [
        ("plain", {"lr": 0.1, "head_lr": 0.3}),
        ("higher", {"lr": 0.1}),
        ("higher", {"lr": 0.1, "head_lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}),
        ("torchopt", {"lr": 0.1}),
        ("torchopt", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
    ],
)
def test_all_contenders_compute_one_gradient(library: str, inner: dict[str, Any]) -> None:
    """In float64; twice each, since an episode must leave nothing behind."""
    if library != "plain":
        pytest.importorskip(library)
    config = tiny(inner={"num_steps": 3, **inner})

    def build(library: str, method: str) -> Contender:
        cpu = torch.device("cpu")
        return Contender(library, method, config=config, device=cpu, dtype=torch.float64)

    theirs = build(library, "unrolled")
    assert why_not(library, config, theirs.model) is None
    before = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    for phase in PHASES:
        wanted = theirs.compute(phase)
        torch.testing.assert_close(theirs.compute(phase), wanted, rtol=0, atol=0)
        assert wanted.abs().max() > 0
        for method in EXACT_METHODS:
            found = build("raymaml", method).compute(phase)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    after = theirs.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
