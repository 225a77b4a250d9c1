"""From stored uint8 pixels to the tensors that learning sees."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymaml.common.episode_checks import unchecked
from raymaml.data.augment import Augmenter
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows
from raymaml.types import EpisodeBatch, tensors_of

_CACHED_ELEMENTS = 2**18
"""Elements converted at once: as floats they take one megabyte, which stays in a core's cache."""


@dataclass(frozen=True)
class Normalize:
    """Subtract ``mean`` and divide by ``std``, channel by channel; both for pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn uint8 [..., H, W, C] into contiguous float32 [..., C, H, W], on the same device.

        Fastest where the channels are planes in memory, as a bank gives them.
        """
        scale, shift = scale_and_shift(self.mean, self.std, pixels.device)
        planes = pixels.movedim(-1, -3)  # [..., C, H, W]
        images = _empty(planes.shape, pixels.device)
        flat = images.flatten(0, -4) if images.dim() > 3 else images[None]
        sources = planes.reshape(flat.shape)
        step = max(1, _CACHED_ELEMENTS // planes.shape[-3:].numel())
        step = step if planes.device.type == "cpu" else len(flat)
        for at in range(0, len(flat), step):
            # multiply, then add: two roundings whatever the device, hence equal bits
            flat[at : at + step].copy_(sources[at : at + step]).mul_(scale).add_(shift)
        return images


@functools.lru_cache(maxsize=16)
def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand that turn bytes into normalised values, [C, 1, 1] each."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return (
        torch.tensor(scale, device=device).view(-1, 1, 1),
        torch.tensor(shift, device=device).view(-1, 1, 1),
    )


def _empty(shape: torch.Size, device: torch.device) -> Tensor:
    """Return memory for float32 images."""
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    # numpy asks Linux for huge pages: without, most of the time goes into page faults
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class EpisodeLoader:
    """Makes an ``EpisodeBatch`` on ``device`` of episodes whose images are in ``bank``.

    Pixels travel to ``device`` as uint8, and are augmented and converted there.
    """

    bank: ImageBank
    normalize: Normalize
    augment: Augmenter
    device: torch.device

    def load(
        self,
        rows: Sequence[EpisodeRows],
        indices: Sequence[int] | range,
        pixels: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
    ) -> EpisodeBatch:
        """Return the episodes ``indices``; a worker's share of a meta-batch may be empty.

        Args:
            rows: images and labels of each.
            indices: these decide the augmentation; training that goes round again counts on.
            pixels: support [E, N*K, H, W, C] and query [E, N*Q, H, W, C] of materialised episodes;
                if None they are gathered from the bank.
        """
        with uploading(self.device):
            batch = self._load(rows, indices, pixels)
        if self.device.type == "cuda":  # else the side stream takes memory again that is in use
            for tensor in tensors_of(batch).values():
                tensor.record_stream(torch.cuda.default_stream(self.device))
        return batch

    def _load(
        self,
        rows: Sequence[EpisodeRows],
        indices: Sequence[int] | range,
        pixels: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None,
    ) -> EpisodeBatch:
        # Shards are checked when they are opened; a check of this batch would wait for the GPU.
        tensors: dict[str, Tensor | int] = {"num_ways": len(rows[0].classes)} if rows else {}
        for number, name in enumerate(("support", "query")):
            images = self._gathered(rows, name) if pixels is None else pixels[number]
            tensors[f"{name}_x"] = self._images(images, name, indices)
            labels = _joined([getattr(each, f"{name}_labels") for each in rows])
            labels_of = torch.from_numpy(labels).view(images.shape[:2])
            tensors[f"{name}_y"] = uploaded(labels_of, self.device)
        return unchecked(EpisodeBatch, tensors)

    def _gathered(self, rows: Sequence[EpisodeRows], name: str) -> NDArray[np.uint8]:
        """Read the support or query images [E, n, H, W, C] from the bank."""
        sets = [getattr(episode, name) for episode in rows]
        pixels = self.bank.images(_joined(sets))
        return pixels.reshape(len(rows), len(sets[0]) if sets else 0, *pixels.shape[1:])

    def _images(
        self, pixels: NDArray[np.uint8], name: str, indices: Sequence[int] | range
    ) -> Tensor:
        """Augment pixels [E, n, H, W, C] episode by episode, and normalise them."""
        # torch wants memory that it may write to; views of mapped files are read-only
        owned = pixels if pixels.flags.writeable else pixels.copy(order="K")
        images = uploaded(torch.from_numpy(owned), self.device)
        if len(images) and getattr(self.augment.pair, name) != "none":
            episodes = zip(images.movedim(-1, -3), indices, strict=True)  # [n, C, H, W] each
            changed = [self.augment(planes, name, index) for planes, index in episodes]
            images = torch.stack(changed).movedim(-3, -1)
        return self.normalize(images)


@contextmanager
def uploading(device: torch.device) -> Iterator[None]:
    """Let a thread copy to a GPU and convert there beside its other work, and wait for the end."""
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``; on the way to a GPU it lies in pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])
