"""A chain of blocks and a linear head under cross-entropy: gradients and Hessian products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from raymaml.kernels.blocks import Block, FirstBlock, Images, InnerBlock, Numbers
from raymaml.kernels.library import Kernels


class Back(Protocol):
    """``Block.backward`` or ``Block.backward_along``."""

    def __call__(
        self, block: Block, grad: Tensor, /, *, down: bool
    ) -> tuple[Tensor | None, Numbers]:
        """Take a gradient, or its tangent, through a block."""


@dataclass(frozen=True)
class Weights:
    """The parameters of a chain, or a gradient, or a direction."""

    blocks: Sequence[Numbers]
    """A gradient that does not go all the way down has those of the upper blocks alone."""
    head: Tensor  # [N, F]
    bias: Tensor  # [N]


class Chain:
    """A pass of labelled images through the blocks and the head; it keeps its tape.

    Args:
        kernels: of the type of all tensors.
        images: of the set.
        labels: ``[B]``.
        weights: of the pass.
        eps: of the norms.
        temperature: factor of the logits.
    """

    def __init__(
        self,
        kernels: Kernels,
        images: Images,
        labels: Tensor,
        weights: Weights,
        *,
        eps: float = 1e-5,
        temperature: float = 1.0,
    ) -> None:
        self.labels, self.head, self.temperature = labels, weights.head, temperature
        first, *others = weights.blocks
        self.blocks: list[Block] = [FirstBlock(kernels, first, eps, images)]
        out = self.blocks[0].forward()
        for numbers in others:
            self.blocks.append(InnerBlock(kernels, numbers, eps, out))
            out = self.blocks[-1].forward()
        self.out, self.features = out, out.flatten(1)  # [B, K, h, w], [B, F]
        self.logits = temperature * torch.addmm(weights.bias, self.features, weights.head.T)
        self.loss = F.cross_entropy(self.logits, labels)
        self.probabilities = self.logits.softmax(1)
        errors = self.probabilities - F.one_hot(labels, len(weights.bias))
        self.errors = errors * (temperature / len(labels))  # the gradient in features head^T + bias

    def gradient(self, lowest: int = 0) -> Weights:
        """Return the gradient of the loss, of the blocks from ``lowest`` on."""
        found = self._down(Block.backward, self.errors @ self.head, lowest)
        return Weights(found, self.errors.T @ self.features, self.errors.sum(0))

    def product(self, direction: Weights, lowest: int = 0) -> Weights:
        """Return the Hessian of the loss times a direction, of the blocks from ``lowest`` on.

        ``gradient`` has gone down to ``lowest`` before.
        """
        out_t: Tensor | None = None
        for block, numbers in zip(self.blocks, direction.blocks, strict=True):
            out_t = block.forward_along(out_t, numbers)
        assert out_t is not None
        features_t = out_t.flatten(1)
        logits_t = torch.addmm(direction.bias, features_t, self.head.T)
        logits_t = self.temperature * torch.addmm(logits_t, self.features, direction.head.T)
        p = self.probabilities
        errors_t = p * (logits_t - (p * logits_t).sum(1, keepdim=True))
        errors_t = errors_t * (self.temperature / len(self.labels))
        below = errors_t @ self.head + self.errors @ direction.head
        found = self._down(Block.backward_along, below, lowest)
        head = self.errors.T @ features_t + errors_t.T @ self.features
        return Weights(found, head, errors_t.sum(0))

    def _down(self, back: Back, features_grad: Tensor, lowest: int) -> list[Numbers]:
        """Take a gradient in the features, or its tangent, down to the block ``lowest``."""
        images = features_grad.reshape(self.out.shape)
        grad: Tensor | None = images.contiguous(memory_format=torch.channels_last)
        found: list[Numbers] = []
        for number in range(len(self.blocks) - 1, lowest - 1, -1):
            assert grad is not None
            grad, numbers = back(self.blocks[number], grad, down=number > lowest)
            found.insert(0, numbers)
        return found
