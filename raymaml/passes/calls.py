"""Calls of a learner: one after the other, whichever threads make them, and errors in words."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from raymaml.common.errors import UserError, reason_of
from raymaml.layers import LOCK

_AT_ONCE = ("vmap", "functorch", "Batching rule", "batched tensor", "broadcast shape")
_MESSAGES = {
    ("torch.utils.checkpoint",): "model: runs again in the backward pass ({reason}), where it has"
    " other weights than in the forward pass; take torch.utils.checkpoint out of it:"
    " inner.gradient: checkpointed saves the memory",
    ("forward AD", "forward mode AD", "support AD"): "inner.gradient: mixed_mode needs forward"
    " derivatives, and an operation of the model has none ({reason}); set inner.gradient:"
    " checkpointed or unrolled",
    _AT_ONCE: "cluster.episodes_per_chunk: an operation of the model cannot take several episodes"
    " at once ({reason}); set cluster.episodes_per_chunk: 1",
    ("deterministic implementation",): "cluster.deterministic: an operation has no deterministic"
    " kernel on a GPU ({reason}); set cluster.deterministic: false, or take another model",
    ("derivative for ", "double backward", "once_differentiable", "differentiate twice"): "inner"
    ".gradient: an operation of the model or of the loss has no second derivative ({reason}); set"
    " inner.gradient: first_order, or, where it is attention, let the encoder call it within"
    " torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
}
"""By words of PyTorch about an operation that lacks the derivatives that a method needs."""


@contextmanager
def alone(*, several: bool = False) -> Iterator[None]:
    """Let a block, or a function, wait until no other thread is in such a block.

    Errors of operations without the derivatives that a method needs become a ``UserError``.

    Args:
        several: whether the block takes several episodes at once, which an operation may not do.

    Raises:
        UserError: naming the operation, as PyTorch does, and the remedy.
    """
    with LOCK:
        try:
            yield
        except RuntimeError as error:  # NotImplementedError is one
            reason = reason_of(error).partition(". ")[0].removesuffix(".")
            for words, message in _MESSAGES.items():
                if (several or words != _AT_ONCE) and any(each in reason for each in words):
                    raise UserError(message.format(reason=reason)) from error
            raise


class Guarded(nn.Module):
    """A module whose tensors are never read or moved while a pass has others in their place."""

    @alone()
    def state_dict(self, *args: Any, **options: Any) -> Any:
        """As ``nn.Module.state_dict``."""
        return super().state_dict(*args, **options)

    @alone()
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As ``nn.Module.load_state_dict``."""
        return super().load_state_dict(*args, **options)

    @alone()
    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module.named_parameters``; ``parameters`` and ``zero_grad`` call it."""
        return iter([*super().named_parameters(*args, **options)])

    @alone()
    def _apply(self, *args: Any, **options: Any) -> Any:  # `to`, `double`, `cuda` call it
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]

    @alone()
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = type(self).__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new
