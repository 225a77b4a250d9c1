"""Implicit MAML: the meta-gradient at the end of adaptation alone (Rajeswaran et al. 2019).

The inner loop descends ``L(phi) + lambda / 2 |phi - theta|^2``. Where it has converged, the
derivative of the query loss in theta is ``x`` of ``(I + H / lambda) x = g``, with ``g`` the query
gradient at phi and ``H`` the Hessian of L there, weight decay included. Frozen parameters psi
get ``dQ/dpsi - (d^2 L / dpsi dphi) x / lambda``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.inner_loop import Adaptation, unroll
from raymaml.passes.derivatives import inner_product, spread
from raymaml.types import Params


def implicit(adaptation: Adaptation) -> EpisodeGradient:
    """Solve for the meta-gradient by conjugate gradients, with Hessian-vector products.

    The metrics are ``cg_residual``, the norm of ``g - (I + H / lambda) x``, and ``cg_curvature``,
    the smallest curvature of I + H / lambda along the directions. Where that is not positive, the
    system is not convex: the search stops, and lambda is too small.
    """
    *_, fast = unroll(adaptation, create_graph=False)
    inner, strength = adaptation.inner, adaptation.inner.proximal or 1.0
    derivatives = adaptation.derivatives
    loss, logits, grads = derivatives.query(fast, adaptation.weights[-1])
    product = derivatives.products(fast)

    def times(direction: Params) -> tuple[Params, Params]:
        """Return (I + H / lambda) times a direction, and the same derivative of frozen ones."""
        along = product(direction)
        found = {
            name: value + (inner.weight_decay * value + along[name]) / strength
            if name in along
            else value
            for name, value in direction.items()
        }
        return found, {name: along[name] for name in adaptation.frozen if name in along}

    first = int(adaptation.several)
    wanted = {name: grads[name] for name in fast.params}
    found, metrics = _solved(lambda each: times(each)[0], wanted, inner.cg_steps, first)
    if adaptation.frozen and fast.params:
        for name, value in times(found)[1].items():
            grads[name] = grads[name] - value / strength
    return EpisodeGradient(
        loss=loss, logits=logits, grads=grads | found, buffers=fast.buffers, metrics=metrics
    )


def _solved(
    times: Callable[[Params], Params], wanted: Params, num_steps: int, first: int
) -> tuple[Params, dict[str, Tensor]]:
    """Solve ``times(x) = wanted`` by conjugate gradients from x = 0 (Hestenes and Stiefel 1952).

    Of several episodes, ``first`` = 1 axis before each tensor's own, each has its own search.
    """
    x = {name: torch.zeros_like(value) for name, value in wanted.items()}
    residual, direction = dict(wanted), dict(wanted)
    square = _dot(residual, residual, first)
    least = torch.full_like(square, torch.inf)
    going = square > 0
    reads = square.device.type == "cpu"  # elsewhere a look at numbers would wait for the device
    for _ in range(num_steps):
        if reads and not going.any():
            break
        product = times(direction)
        curvature = _dot(direction, product, first)
        relative = curvature / _dot(direction, direction, first)
        least = torch.where(going, torch.minimum(least, relative), least)
        going = going & (curvature > 0)
        size = torch.where(going, square / curvature, 0)
        x = _plus(x, size, direction)
        residual = _plus(residual, -size, product)
        before, square = square, _dot(residual, residual, first)
        going = going & (square > 0)
        direction = _plus(residual, torch.where(going, square / before, 0), direction)
    if reads and bool((least <= 0).any()):
        warnings.warn(  # constant words: Python shows them once
            "inner.proximal is too small: I + H / lambda is not positive definite, and conjugate"
            " gradients stop at such a direction; raise it (cg_curvature in the metrics)",
            RuntimeWarning,
            stacklevel=2,
        )
    return x, {
        "cg_residual": square.sqrt(),
        "cg_curvature": torch.where(least.isfinite(), least, 1),
    }


def _dot(a: Params, b: Params, first: int) -> Tensor:
    return inner_product(a.values(), (b[name] for name in a), first) if a else torch.zeros(())


def _plus(a: Params, size: Tensor, b: Params) -> Params:
    """Return a + size b, with a size for each episode."""
    return {name: value + spread(size, value) * b[name] for name, value in a.items()}
