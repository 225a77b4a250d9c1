"""The state of the outer loop: all that a checkpoint must hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raymaml.common.errors import UserError, gathered
from raymaml.config.base import Count
from raymaml.config.inner import InnerConfig
from raymaml.config.model import OuterSteps
from raymaml.config.schema import Config
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.seeding import fold_in
from raymaml.storage.place import Place
from raymaml.training.optimizer import build_optimizer
from raymaml.training.settings import gradient_method, image_layout, set_precision
from raymaml.training.tensor_file import can_be_kept, is_plain
from raymaml.types import Params

WEIGHTS: Literal["params.safetensors"] = "params.safetensors"
"""The file of a checkpoint that evaluation needs."""


@dataclass(frozen=True)
class Validation:
    """Result on the fixed validation episodes, with the weights before outer step ``step``."""

    step: Count
    accuracy: float
    ci95: float
    loss: float


@dataclass
class TrainState:
    """Step, weights, optimizer state, the last validation, and those of the best checkpoints.

    The position in the data is ``step`` alone: outer step ``s`` learns from the training episodes
    ``f + s*B .. f + (s+1)*B - 1``, and the first, ``f``, is a function of the seed (contract 3).
    """

    learner: MetaLearner
    optimizer: torch.optim.Optimizer
    step: int = 0
    validation: Validation | None = None
    leaders: tuple[Validation, ...] = ()
    """The best validations, the best first."""

    @property
    def best(self) -> Validation | None:
        """The best validation; None before the first one."""
        return self.leaders[0] if self.leaders else None

    @property
    def params(self) -> Params:
        """The meta-parameters."""
        return self.learner.params

    @property
    def num_params(self) -> int:
        """Number of meta-parameters: P."""
        return sum(value.numel() for value in self.params.values())

    def digest(self) -> int:
        """Return 63 bits that differ when any bit of the weights or running moments differs."""
        sha = hashlib.sha256()
        for value in self.weights.values():
            apart = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            sha.update(apart.reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bf16
        return int.from_bytes(sha.digest()[:8], "big") >> 1

    def record(self, validation: Validation, keep_best: int = 1) -> None:
        """Take note of a validation; an equal accuracy does not replace an older one."""
        self.validation = validation
        found = [*self.leaders, validation]  # sorting leaves equal ones in their order
        self.leaders = tuple(sorted(found, key=lambda each: -each.accuracy)[:keep_best])

    @property
    def weights(self) -> Params:
        """Meta-parameters and moments: all that evaluation needs."""
        return self.params | self.learner.moments


def build_learner(
    config: Config,
    image_shape: tuple[int, int, int],
    num_ways: int,
    device: torch.device,
    test_inner: InnerConfig | None = None,
) -> MetaLearner:
    """Return the meta-learner with its initial weights, a function of ``config.seed``.

    On a GPU the process keeps the precision of the configuration. ``test_inner`` is the inner loop
    of evaluation, ``config.test_inner`` if None.

    Raises:
        UserError: the model cannot be built, has nothing to learn, or name patterns do not fit it.
    """
    if device.type == "cuda":
        set_precision(config.cluster)
    model = build_model(
        config.model,
        image_shape=image_shape,
        num_ways=num_ways,
        seed=fold_in(config.seed, "init"),
        num_steps=max(config.inner.num_steps, 1),
    )
    train = config.episodes.train
    support = (train.num_ways * train.num_shots, *image_shape)
    method = gradient_method(config.inner, config.model, config.cluster, support, device)
    learner = MetaLearner(
        model.to(device),
        config.inner.model_copy(update={"gradient": method}),
        head_start=config.model.head,
        test_inner=config.test_inner if test_inner is None else test_inner,
        channels_last=image_layout(config.cluster, device) == "channels_last",
        half_precision=torch.bfloat16 if config.cluster.precision == "bf16" else None,
        seed=fold_in(config.seed, "rule"),
        kernels=config.cluster.kernels == "auto",
    )
    if not learner.params:
        raise UserError(
            "model: has no parameters to learn: the encoder has none, and the head starts at zero",
            remedy="set model.head: learned, or take another encoder",
        )
    lasting = learner.params | learner.moments
    if odd := [name for name, value in lasting.items() if not can_be_kept(value)]:
        raise UserError(
            f"model: checkpoints cannot hold {', '.join(odd)} ({lasting[odd[0]].dtype},"
            f" {lasting[odd[0]].layout})",
            remedy="register it with persistent=False, or give it a plain type such as float32",
        )
    return learner


def build_classifier(
    config: Config, image_shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> MetaLearner:
    """Return the model with a head over all training classes, as a learner that adapts nothing."""
    model = config.model.model_copy(update={"head": "learned"})
    still = InnerConfig(num_steps=0, gradient="first_order")
    plain = config.model_copy(update={"model": model})
    return build_learner(
        plain.model_copy(update={"inner": still}), image_shape, num_classes, device, still
    )


def build_state(
    config: Config, image_shape: tuple[int, int, int], device: torch.device
) -> TrainState:
    """Return the state of a new run before outer step 0."""
    learner = build_learner(config, image_shape, config.episodes.train.num_ways, device)
    return initial_state(learner, config.outer)


def initial_state(learner: MetaLearner, outer: OuterSteps) -> TrainState:
    """Return the state before outer step 0, from the weights that ``learner`` has."""
    return TrainState(learner, build_optimizer(outer, learner.params))


@torch.no_grad()
def load_params(learner: MetaLearner, params: Params) -> None:
    """Copy into the learner's meta-parameters and moments; names and shapes must agree."""
    for name, value in (learner.params | learner.moments).items():
        value.copy_(params[name])


def require_fitting(path: Place, params: Params, wanted: Params) -> None:
    """Check that the weights from the checkpoint ``path`` are all that are ``wanted``.

    Others are allowed beside them: the running moments of a model that is judged by another norm.

    Raises:
        UserError: naming what is missing, or of another shape.
    """
    with gathered() as mistakes:
        remedy = "judge it as it was trained"
        missing = [name for name, value in wanted.items() if not _fits(params.get(name), value)]
        if missing:
            mistakes.add(f"{path}: holds no {', '.join(missing)}, which the model needs", remedy)
        for name, value in wanted.items():
            if name not in missing and params[name].shape != value.shape:
                has, needed = list(params[name].shape), list(value.shape)
                mistakes.add(
                    f"{path}: {name} has the shape {has}, the model needs {needed}", remedy
                )


def _fits(value: object, wanted: Tensor) -> bool:
    """Whether a value is a plain tensor of the wanted type, or of another floating-point type."""
    if not isinstance(value, Tensor) or not is_plain(value):
        return False
    both = value.is_floating_point() and wanted.is_floating_point()
    return both or value.dtype == wanted.dtype
