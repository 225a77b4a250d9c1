"""Whether a method of the meta-gradient fits a model: it gives the same number as ``unrolled``."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymaml.common.errors import UserError
from raymaml.common.logs import LOG
from raymaml.meta.calls import alone
from raymaml.meta.freezing import frozen_params
from raymaml.meta.inner_loop import unroll
from raymaml.meta.learner import MetaLearner
from raymaml.meta.passes import Passes
from raymaml.meta.start import begin
from raymaml.types import Episode

EXACT = {"auto", "checkpointed", "mixed_mode"}
"""Methods that claim the number of ``unrolled``."""
STEPS = 2
"""Inner steps of the comparison: the second one starts from the state that the first one leaves."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative, by the type of calculation. In float64 methods agree to 1e-10, and to 1e-6 where a
layer calculates in float32 all the same; in float32 to 1e-5. Products of bfloat16 are 4e-3 off."""

_NOT_COMPARED = (
    "inner.gradient: mixed_mode could not be compared with unrolled, since an operation of the"
    " model has no second derivative backward"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The meta-gradient of one episode by a method and by ``unrolled``."""

    method: str
    found: float
    """Length of the gradient by the method."""
    exact: float
    """Length of the gradient by ``unrolled``."""
    error: float
    """Length of the difference, in lengths of the gradient by ``unrolled``."""
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether training may go on: also where ``unrolled`` is not finite, as a step will say."""
        return self.error <= self.tolerance or not math.isfinite(self.exact)

    def problem(self) -> str:
        """Say by how much the two disagree, why that happens, and what to do."""
        return (
            f"inner.gradient: {self.method} gives a meta-gradient of length {self.found:.6g} on a"
            f" small episode, unrolled one of length {self.exact:.6g}; their difference is"
            f" {self.error:.1e} of that, more than {self.tolerance:.0e}: a layer of the model"
            " carries state past a pass, draws random numbers that are not torch's, or leaves"
            " something out of the derivative; set inner.gradient: unrolled"
        )


def check_gradient(learner: MetaLearner, episode: Episode) -> None:
    """Check that the learner's method of the meta-gradient is right for its model.

    Call it once before a training loop of your own, with a small episode. Model, gradients and
    random numbers stay as they are.

    Where ``mixed_mode`` alone has the derivatives, there is nothing to compare; a warning says so.

    Raises:
        UserError: the method and ``unrolled`` disagree, one gradient computed twice differs, or the
            model lacks a derivative.
    """
    comparison = compare(learner, episode)
    if not comparison.agrees:
        raise UserError(comparison.problem())


@alone
def compare(learner: MetaLearner, episode: Episode) -> Comparison:
    """Compute the gradient of one episode by the learner's method and by ``unrolled``.

    On a copy of the model in float64 and without autocast, since rounding in less would hide a
    disagreement; a model that cannot be copied or run so is compared as it is.

    Raises:
        UserError: the model lacks a derivative that the method needs, or carries state outside.
    """
    with _random_numbers_kept():
        try:
            return _compare(_twin(learner, copy.deepcopy(learner.model).double(), None), episode)
        except Exception:  # of a user's module, which may be made for one type alone
            return _compare(_twin(learner, learner.model, learner.half_precision), episode)


def made_up_episode(
    image_shape: tuple[int, int, int], num_ways: int, device: torch.device
) -> Episode:
    """Return an episode of one support and one query image a class, of noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, num_ways, *image_shape, generator=generator).to(device)
    labels = torch.arange(num_ways, device=device)
    return Episode(support_x=support, support_y=labels, query_x=query, query_y=labels)


def _twin(learner: MetaLearner, model: nn.Module, half: torch.dtype | None) -> MetaLearner:
    inner = learner.inner.model_copy(update={"num_steps": min(learner.inner.num_steps, STEPS)})
    return MetaLearner(
        model,
        inner,
        head=learner.head,
        channels_last=learner.channels_last,
        half_precision=half,
    )


def _compare(twin: MetaLearner, episode: Episode) -> Comparison:
    dtype = next(twin.model.parameters()).dtype
    support_x, query_x = episode.support_x.to(dtype), episode.query_x.to(dtype)
    episode = replace(episode, support_x=support_x, query_x=query_x)
    tolerance = TOLERANCE[twin.half_precision or dtype]
    with _no_second_runs(twin.model):
        found = _gradient(twin, episode)
        _require_repeated(found, _gradient(twin, episode), tolerance)
        return _compared(twin, episode, found, tolerance)


def _compared(twin: MetaLearner, episode: Episode, found: Tensor, tolerance: float) -> Comparison:
    method, exact = twin.inner.gradient, found
    if method != "first_order" and _has_single_derivatives(twin, episode):
        if method != "mixed_mode":
            raise UserError(
                "inner.gradient: an operation of the model is once_differentiable, so that its"
                f" second derivative would be left out by {method}",
                remedy="set inner.gradient: first_order",
            )
        LOG.warning(_NOT_COMPARED)
    elif method in EXACT:
        exact = _unrolled(twin, episode, found)
    length = exact.norm()
    error = (found - exact).norm() / length if length > 0 else found.norm()
    return Comparison(
        method=method,
        found=found.norm().item(),
        exact=length.item(),
        error=error.item(),
        tolerance=tolerance,
    )


def _require_repeated(found: Tensor, again: Tensor, tolerance: float) -> None:
    if found.isfinite().all() and (found - again).norm() > tolerance * found.norm():
        raise UserError(
            f"model: gives a meta-gradient of length {found.norm():.6g} on a small episode, and of"
            f" {again.norm():.6g} on the same one again: a layer carries state from pass to pass"
            " outside of the model's modules, such as in its class or in a plain object",
            remedy="keep it in a buffer, or in an attribute of the module",
        )


def _unrolled(twin: MetaLearner, episode: Episode, found: Tensor) -> Tensor:
    """Return the gradient by ``unrolled``; by the method itself if it alone has the derivatives."""
    method, twin.inner = twin.inner, twin.inner.model_copy(update={"gradient": "unrolled"})
    try:
        return _gradient(twin, episode)
    except UserError:
        if method.gradient != "mixed_mode":
            raise
        LOG.warning(_NOT_COMPARED)
        return found


def _has_single_derivatives(twin: MetaLearner, episode: Episode) -> bool:
    """Tell whether the gradient of an inner step leads through what cannot be differentiated again.

    PyTorch puts a node there that raises an error when it is run. A derivative in given inputs does
    not run it, since no input lies behind it, and is wrong.
    """
    if twin.inner.num_steps == 0:
        return False
    inner = twin.inner.model_copy(update={"num_steps": 1})
    fixed = frozen_params("inner.frozen", twin.model, inner.frozen)
    frozen, start = begin(twin.model, twin.head, episode, fixed, inner)
    losses = Passes(twin.model, twin.half_precision).losses(episode).with_frozen(frozen)
    *_, fast = unroll(losses.support, start.detached(), inner, create_graph=True)
    waiting = [value.grad_fn for value in fast.params.values()]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _gradient(learner: MetaLearner, episode: Episode) -> Tensor:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (a user's module may draw from it)
    grads = learner.episode_gradient(episode).grads
    return torch.cat([grads[name].flatten() for name in learner.params]).cpu()


@contextmanager
def _no_second_runs(model: nn.Module) -> Iterator[None]:
    """Let no module run outside a pass: it would have its own weights, not those of the pass."""

    def require_pass(module: nn.Module, _inputs: Any) -> None:
        if vars(module) is own[module]:
            raise UserError(
                f"model: {type(module).__name__} runs again in the backward pass, where it has"
                " other weights than in the forward pass",
                remedy="take torch.utils.checkpoint out of the model: inner.gradient: checkpointed"
                " saves the memory",
            )

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
