"""The loss of a support or a query set: cross-entropy of labels, or any function that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from raymaml.common.errors import UserError

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[B, ...]``, targets ``[B, ...]``) -> the loss of one set, a number."""


def balanced_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the classes among the targets of the mean cross-entropy of each."""
    ways = torch.arange(outputs.shape[-1], device=targets.device)
    counts = (targets[:, None] == ways).sum(0)  # [N]
    return F.cross_entropy(outputs, targets, (1 / counts).to(outputs.dtype))


def require_targets(loss_fn: LossFn, targets: Tensor) -> None:
    """Raise a ``UserError`` for floating-point targets of cross-entropy: of one column it is 0."""
    if loss_fn is F.cross_entropy and targets.is_floating_point():
        raise UserError(
            f"support_y, query_y: hold {targets.dtype}, and the loss is cross-entropy of labels",
            remedy="give labels, whole numbers 0 to N-1, or MetaLearner a loss for other targets:"
            " loss_fn=F.mse_loss, or nn.CrossEntropyLoss() for probabilities of classes",
        )


def loss_of(loss_fn: LossFn, outputs: Tensor, targets: Tensor, *, several: bool) -> Tensor:
    """Return the loss of a set; of several episodes, along a leading axis E, the sum of theirs.

    Along a direction (forward derivatives) the gradient alone is that of the loss.

    Raises:
        UserError: the loss is not one number, or lacks the second derivative along a direction.
    """
    if loss_fn is F.cross_entropy:  # a mean over images: all episodes in one call
        count = len(outputs) if several else 1
        return count * F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    if not several:
        return _one_loss(loss_fn, outputs, targets)
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([_one_loss(loss_fn, *each) for each in pairs]).sum()


def _one_loss(loss_fn: LossFn, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss, or along a direction a number with its gradient.

    Few losses of PyTorch have forward derivatives of their gradient (that of ``mse_loss`` raises an
    error), and all can be differentiated twice backward. With ``g`` the loss's gradient in the
    outputs ``o``, ``H`` its Hessian and ``o'`` the tangent, ``<o, g>`` with the tangent ``H o'`` of
    ``g`` has the gradient of the loss in the weights, and the derivative of that along the
    direction.
    """
    primal, tangent = forward_ad.unpack_dual(outputs)
    if tangent is None:
        return _number(loss_fn(outputs, targets))
    at = primal.detach().requires_grad_()
    loss = _number(loss_fn(at, targets))
    one = torch.ones_like(loss, requires_grad=True)  # else PyTorch does not mark the last operation
    (grad,) = torch.autograd.grad(loss, at, one, create_graph=True)
    if once_differentiable([grad]):
        raise UserError(
            "loss_fn: an operation of the loss is once_differentiable: it has no second derivative",
            remedy="set inner.gradient: first_order, or take another loss",
        )
    (bend,) = torch.autograd.grad(grad, at, tangent, allow_unused=True, materialize_grads=True)
    along: Tensor = forward_ad.make_dual(grad.detach(), bend)
    return (outputs * along).sum()


def _number(loss: object) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
        return loss
    found = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
    raise UserError(
        f"loss_fn: returns {found}",
        remedy="it must return one floating-point number, such as the mean: reduction='mean'",
    )


def once_differentiable(values: Iterable[Tensor]) -> bool:
    """Return whether an operation behind ``values``, which are gradients, has no other derivative.

    PyTorch puts a node behind its gradient that raises an error when it runs. A derivative in given
    inputs does not run it, since no input lies behind it, and is wrong.
    """
    waiting = [value.grad_fn for value in values]
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
