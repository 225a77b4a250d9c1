"""Whether a method of the meta-gradient fits a model: it gives the same number as ``unrolled``."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.meta.inner_loop import unroll
from raymaml.meta.learner import MetaLearner
from raymaml.passes.calls import alone
from raymaml.passes.losses import once_differentiable
from raymaml.types import Buffers, Episode, Fast, tensors_of

EXACT = {"auto", "checkpointed", "mixed_mode"}
"""Methods that claim the number of ``unrolled``."""
STEPS = 2
"""Inner steps of the comparison: the second starts from the state that the first leaves."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative, by type. In float64 methods agree to 1e-10, and to 1e-6 where a layer computes in
float32 all the same; in float32 to 1e-5. Products in bfloat16 are 4e-3 off."""

_NOT_COMPARED = (
    "inner.gradient: mixed_mode could not be compared with unrolled, since an operation of the"
    " model or of the loss has no second derivative backward"
)


def check_gradient(learner: MetaLearner, episode: Episode) -> None:
    """Check that the learner's method of the meta-gradient is right for its model.

    Call it once before a training loop of your own, with a small episode. Model, gradients and
    random numbers stay as they are.

    The method is compared with ``unrolled`` on a copy of the model in float64 and without autocast,
    since rounding in less would hide a disagreement; a model that cannot be copied or run so is
    compared as it is. Where ``mixed_mode`` alone has the derivatives, there is nothing to compare;
    a warning says so.

    Raises:
        UserError: the method and ``unrolled`` disagree, one gradient computed twice differs, or the
            model lacks a derivative.
    """
    if problem := _disagreement(learner, episode):
        raise UserError(problem, remedy="set inner.gradient: unrolled")


@alone()
def _disagreement(learner: MetaLearner, episode: Episode) -> str | None:
    with _random_numbers_kept():
        try:
            twin = copy.deepcopy(learner).double()
            twin.half_precision = None
            return _compared(twin, episode)
        except Exception:  # of a user's module, which may be made for one type alone
            return _compared(copy.copy(learner), episode)


def made_up_episode(
    image_shape: tuple[int, int, int], num_ways: int, device: torch.device
) -> Episode:
    """Return an episode of one support and one query image a class, of noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, num_ways, *image_shape, generator=generator).to(device)
    labels = torch.arange(num_ways, device=device)
    return Episode(support_x=support, support_y=labels, query_x=query, query_y=labels)


def _compared(twin: MetaLearner, episode: Episode) -> str | None:
    """Compare on a copy of the learner, whose inner loop this changes."""
    inner = twin.inner
    twin.inner = inner.model_copy(update={"num_steps": min(inner.num_steps, STEPS)})
    dtype = next(twin.model.parameters()).dtype
    tolerance = TOLERANCE[twin.half_precision or dtype]
    tensors = tensors_of(episode).items()
    numbers: Any = {n: v.to(dtype) for n, v in tensors if v.is_floating_point()}
    episode = replace(episode, **numbers)
    with _no_second_runs(twin.model):
        found = _gradient(twin, episode)
        _require_repeated(found, _gradient(twin, episode), tolerance)
        return difference(inner.gradient, found, _exact(twin, episode, found), tolerance)


def difference(method: str, found: Tensor, exact: Tensor, tolerance: float) -> str | None:
    """Return by how much a gradient and that by ``unrolled`` differ; None if little enough.

    Nothing is said where ``unrolled`` is not finite: the first step of a training reports that.
    """
    length = exact.norm().item()
    error = (found - exact).norm().item() / (length or 1)
    if error <= tolerance or not math.isfinite(length):
        return None
    return (
        f"inner.gradient: {method} gives a meta-gradient of length {found.norm():.6g} on a small"
        f" episode, unrolled one of length {length:.6g}; their difference is {error:.1e} of that,"
        f" more than {tolerance:.0e}: a layer of the model carries state past a pass, draws random"
        " numbers that are not torch's, or leaves something out of the derivative"
    )


def _require_repeated(found: Tensor, again: Tensor, tolerance: float) -> None:
    if found.isfinite().all() and (found - again).norm() > tolerance * found.norm():
        raise UserError(
            f"model: gives a meta-gradient of length {found.norm():.6g} on a small episode, and of"
            f" {again.norm():.6g} on the same one again: a layer carries state from pass to pass"
            " outside of the model's modules, such as in its class or in a plain object",
            remedy="keep it in a buffer, or in an attribute of the module",
        )


def _exact(twin: MetaLearner, episode: Episode, found: Tensor) -> Tensor:
    """Return the gradient by ``unrolled``, or ``found`` where there is nothing to compare."""
    method = twin.inner.gradient
    if method in EXACT | {"unrolled"} and _has_single_derivatives(twin, episode):
        if method != "mixed_mode":
            raise UserError(
                "inner.gradient: an operation of the model or of the loss is once_differentiable,"
                f" so that its second derivative would be left out by {method}",
                remedy="set inner.gradient: first_order",
            )
        LOG.warning(_NOT_COMPARED)
    elif method in EXACT:
        twin.inner = twin.inner.model_copy(update={"gradient": "unrolled"})
        try:
            return _gradient(twin, episode)
        except UserError:
            if method != "mixed_mode":
                raise
            LOG.warning(_NOT_COMPARED)
    return found


def _has_single_derivatives(twin: MetaLearner, episode: Episode) -> bool:
    """Return whether an operation in an inner step cannot be differentiated a second time."""
    if twin.inner.num_steps == 0:
        return False
    inner = twin.inner.model_copy(update={"num_steps": 1})
    adaptation = twin.adaptation(episode, inner)
    # else PyTorch does not mark the loss's last operation
    scale = torch.ones((), requires_grad=True)

    def support(fast: Fast) -> tuple[Tensor, Buffers]:
        loss, buffers = adaptation.support(fast)
        return scale * loss, buffers

    *_, fast = unroll(replace(adaptation, support=support), create_graph=True)
    return once_differentiable(fast.params.values())


def _gradient(learner: MetaLearner, episode: Episode) -> Tensor:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (a user's module may draw from it)
    grads = learner.episode_gradient(episode).grads
    return torch.cat([grads[name].flatten() for name in learner.params]).cpu()


@contextmanager
def _no_second_runs(model: nn.Module) -> Iterator[None]:
    """Raise an error when a module runs outside a pass, with weights other than the pass's."""

    def require_pass(module: nn.Module, _inputs: Any) -> None:
        if vars(module) is own[module]:
            raise RuntimeError(f"torch.utils.checkpoint runs {type(module).__name__}")

    own = {module: vars(module) for module in model.modules()}
    hooks = [module.register_forward_pre_hook(require_pass) for module in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
