"""The words that every part of raymaml shares.

Shape letters, here and in every comment: ``E`` episodes, ``N`` ways, ``K`` shots, ``Q`` queries
per class, ``S = N*K`` support images, ``C H W`` an image, ``P`` parameters, ``T`` inner steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by their dotted name, as ``nn.Module.named_parameters`` names them."""
Buffers = dict[str, Tensor]
"""Buffers by their dotted name: the moments that norm layers carry from pass to pass."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One support set and one query set of a task."""

    support_x: Tensor  # [N*K, C, H, W]
    support_y: Tensor  # [N*K], int64 in 0..N-1
    query_x: Tensor  # [N*Q, C, H, W]
    query_y: Tensor  # [N*Q]

    def channels_last(self) -> Episode:
        """Return the same episode with images in the channels-last memory format."""
        layout = torch.channels_last  # by `to`: `contiguous` leaves the strides of one channel
        return replace(
            self,
            support_x=self.support_x.to(memory_format=layout),
            query_x=self.query_x.to(memory_format=layout),
        )


@dataclass(frozen=True, kw_only=True)
class EpisodeBatch:
    """Episodes of one shape, stacked: what a worker learns from in one outer step."""

    support_x: Tensor  # [E, N*K, C, H, W]
    support_y: Tensor  # [E, N*K]
    query_x: Tensor  # [E, N*Q, C, H, W]
    query_y: Tensor  # [E, N*Q]

    def __len__(self) -> int:
        return self.support_x.shape[0]

    def __getitem__(self, index: int) -> Episode:
        return Episode(
            support_x=self.support_x[index],
            support_y=self.support_y[index],
            query_x=self.query_x[index],
            query_y=self.query_y[index],
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def chunks(self, size: int) -> Iterator[EpisodeBatch]:
        """Yield runs of ``size`` consecutive episodes; the last may be shorter."""
        for first in range(0, len(self), size):
            some = slice(first, first + size)
            yield EpisodeBatch(
                **{field.name: getattr(self, field.name)[some] for field in fields(self)}
            )

    def to(self, device: torch.device) -> EpisodeBatch:
        """Return the same episodes on ``device``."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return EpisodeBatch(**moved)
