"""A chain of blocks and a linear head under cross-entropy: gradients and Hessian products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymaml.kernels.batched import BatchedBlock, BatchedImages
from raymaml.kernels.blocks import Block, Images, Norm, Numbers


@dataclass(frozen=True)
class Weights:
    """The parameters of a chain, or a gradient, or a direction; of several episodes, each tensor
    has a leading axis E."""

    blocks: Sequence[Numbers]
    """A gradient that does not go all the way down has those of the upper blocks alone."""
    head: Tensor  # [N, F]
    bias: Tensor  # [N]
    temperature: Tensor  # [], factor of the logits


class Chain:
    """A pass of the images of one episode, or of several, through blocks and head; it keeps a tape.

    With ``u = features head^T + bias`` the logits are ``temperature * u``, and ``errors`` the
    derivatives of the mean cross-entropy in them.

    Args:
        images: of the set.
        weights: of the pass.
        norms: of the blocks.
        order: highest derivative that follows: 0, 1, or 2 for ``product``.
    """

    def __init__(
        self,
        images: Images | BatchedImages,
        weights: Weights,
        norms: Sequence[Norm],
        *,
        order: int = 2,
    ) -> None:
        self.weights, self.blocks = weights, list[Block | BatchedBlock]()
        out: Tensor | None = None
        for numbers, norm in zip(weights.blocks, norms, strict=True):
            block = images.block(numbers, norm, out, order)
            out = block.forward()
            self.blocks.append(block)
        assert out is not None
        self.out, self.features = out, out.flatten(-3)  # [B, K, h, w], [B, F]
        self.u = self.features @ weights.head.mT + weights.bias[..., None, :]  # [B, N]
        self.temperature = weights.temperature[..., None, None]
        self.logits = self.temperature * self.u

    @property
    def nbytes(self) -> int:
        """The memory of the tape, in bytes, with all that ``gradient`` adds."""
        tensors = {id(each): each for block in self.blocks for each in block.kept()}
        return sum(each.nbytes for each in tensors.values())

    def gradient(self, labels: Tensor, lowest: int = 0) -> Weights:
        """Return the gradient of the mean cross-entropy, of the blocks from ``lowest`` on.

        Args:
            labels: ``[B]``.
            lowest: block to go down to; of as many as there are, the head alone has a gradient.
        """
        self.probabilities = self.logits.softmax(-1)
        ones = labels[..., None] == torch.arange(self.logits.shape[-1], device=labels.device)
        self.errors = (self.probabilities - ones.to(self.u.dtype)) / labels.shape[-1]
        along = self.temperature * self.errors  # the gradient in u
        found = self._down(along @ self.weights.head, lowest)
        temperature = (self.errors * self.u).sum((-2, -1))
        return Weights(found, along.mT @ self.features, along.sum(-2), temperature)

    def product(self, direction: Weights) -> Weights:
        """Return the Hessian of that loss times a direction, in which the temperature stays.

        ``gradient`` has gone all the way down before.
        """
        out_t: Tensor | None = None
        for block, numbers in zip(self.blocks, direction.blocks, strict=True):
            out_t = block.forward_along(out_t, numbers)
        assert out_t is not None
        features_t, head, p = out_t.flatten(-3), self.weights.head, self.probabilities
        u_t = features_t @ head.mT + direction.bias[..., None, :]
        u_t = u_t + self.features @ direction.head.mT
        logits_t = self.temperature * u_t
        errors_t = p * (logits_t - (p * logits_t).sum(-1, keepdim=True)) / p.shape[-2]
        along, along_t = (self.temperature * each for each in (self.errors, errors_t))
        below = along_t @ head + along @ direction.head
        found = self._down(below, 0, along=True)
        head_grad = along.mT @ features_t + along_t.mT @ self.features
        temperature = (errors_t * self.u + self.errors * u_t).sum((-2, -1))
        return Weights(found, head_grad, along_t.sum(-2), temperature)

    def _down(self, features_grad: Tensor, lowest: int, *, along: bool = False) -> list[Numbers]:
        """Take a gradient in the features, or its tangent, down to the block ``lowest``."""
        images = features_grad.reshape(self.out.shape)
        grad: Tensor | None = images
        if images.dim() == 4:
            grad = images.contiguous(memory_format=torch.channels_last)
        found: list[Numbers] = []
        for number in range(len(self.blocks) - 1, lowest - 1, -1):
            assert grad is not None
            block = self.blocks[number]
            back = block.backward_along if along else block.backward
            grad, numbers = back(grad, down=number > lowest)
            found.insert(0, numbers)
        return found
