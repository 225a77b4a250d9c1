"""The words that every part of raymaml shares.

Shape letters, here and in every comment: ``E`` episodes, ``N`` ways, ``K`` shots, ``Q`` queries
per class, ``S = N*K`` support images, ``C H W`` an image, ``P`` parameters, ``T`` inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymaml.common.episode_checks import checked, unchecked

_IMAGES = ("support_x", "query_x")
Params = dict[str, Tensor]
"""Parameters by their dotted name, as ``nn.Module.named_parameters`` names them."""
Buffers = dict[str, Tensor]
"""Buffers by their dotted name: the moments that norm layers carry from pass to pass."""
State = dict[str, Params]
"""Values that an inner rule carries from step to step: by kind, then by name of the parameter."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One support set and one query set of a task; a ``UserError`` names every mistake in them.

    Whole numbers as targets are labels of images. Floating-point targets, as of a regression, are
    of any shape ``[n, ...]``, and so are their inputs.
    """

    support_x: Tensor  # [N*K, C, H, W]
    support_y: Tensor  # [N*K], int64 in 0..N-1
    query_x: Tensor  # [N*Q, C, H, W]
    query_y: Tensor  # [N*Q]
    support_batches: Tensor | None = None  # [T, B], support rows of each inner step; None: all
    num_ways: int | None = None  # N; None: it is read from the labels

    def __post_init__(self) -> None:
        vars(self).update(checked(tensors_of(self), batch=False, num_ways=self.num_ways))

    def channels_last(self) -> Episode:
        """Return the same episode with images in the channels-last memory format."""
        layout = torch.channels_last  # by `to`: `contiguous` leaves the strides of one channel
        images = {name: getattr(self, name) for name in _IMAGES if getattr(self, name).dim() == 4}
        laid = {name: value.to(memory_format=layout) for name, value in images.items()}
        return unchecked(Episode, vars(self) | laid)


@dataclass(frozen=True, kw_only=True)
class EpisodeBatch:
    """Episodes of one shape, stacked: a worker learns from one batch in an outer step."""

    support_x: Tensor  # [E, N*K, C, H, W]
    support_y: Tensor  # [E, N*K]
    query_x: Tensor  # [E, N*Q, C, H, W]
    query_y: Tensor  # [E, N*Q]
    support_batches: Tensor | None = None  # [E, T, B]
    num_ways: int | None = None

    def __post_init__(self) -> None:
        vars(self).update(checked(tensors_of(self), batch=True, num_ways=self.num_ways))

    def __len__(self) -> int:
        return self.support_x.shape[0]

    def __getitem__(self, index: int) -> Episode:
        tensors = {name: value[index] for name, value in tensors_of(self).items()}
        return unchecked(Episode, vars(self) | tensors)

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def chunks(self, size: int) -> Iterator[EpisodeBatch]:
        """Yield runs of ``size`` consecutive episodes; the last may be shorter."""
        for first in range(0, len(self), size):
            yield self.among(range(first, first + size))

    def among(self, rows: range) -> EpisodeBatch:
        """Return consecutive episodes."""
        return self._by_tensor(lambda value: value[rows.start : rows.stop])

    def shuffled(self) -> EpisodeBatch:
        """Return other episodes of this shape: images and episodes move one place, labels stay."""
        return self._by_tensor(lambda x: x.roll((1, 1), (0, 1)) if x.dim() > 2 else x.clone())

    def to(self, device: torch.device) -> EpisodeBatch:
        """Return the same episodes on ``device``."""
        return self._by_tensor(lambda value: value.to(device, non_blocking=True))

    def _by_tensor(self, change: Callable[[Tensor], Tensor]) -> EpisodeBatch:
        changed = {name: change(value) for name, value in tensors_of(self).items()}
        return unchecked(EpisodeBatch, vars(self) | changed)


def tensors_of(episode: Episode | EpisodeBatch) -> dict[str, Tensor]:
    """Return the tensors of an episode by name."""
    found = {name: value for name, value in vars(episode).items() if value is not None}
    found.pop("num_ways", None)
    return found


@dataclass(frozen=True, kw_only=True)
class Fast:
    """The state that the inner loop carries from step to step."""

    params: Params
    """The adapted parameters, theta'."""
    state: State
    """Values of the update rule."""
    buffers: Buffers
    """Moments that norm layers accumulate; never differentiated through."""
    steps: int = 0
    """Inner steps taken so far."""

    @property
    def last_step(self) -> int:
        """The inner step before this state; 0 before any."""
        return max(self.steps - 1, 0)

    def among(self, frozen: Params) -> Fast:
        """Return the state with all parameters."""
        return replace(self, params=frozen | self.params)

    def detached(self) -> Fast:
        """Return fresh leaves of the same values."""
        state = {kind: leaves(values) for kind, values in self.state.items()}
        return replace(self, params=leaves(self.params), state=state)


SupportLoss = Callable[[Fast], tuple[Tensor, Buffers]]
"""Fast weights -> loss on the support set, and the moments after the pass."""
QueryLoss = Callable[[Fast], tuple[Tensor, Tensor]]
"""Fast weights -> loss on the query set, and the logits."""


def leaves(params: Params) -> Params:
    """Return the same values as leaves: detached, and differentiable."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}
