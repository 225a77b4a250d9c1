"""A trained model, adapted to one support set: pixels in, probabilities out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raymaml.classify.adapted import adapted, fold_logits, query_logits
from raymaml.common.errors import UserError
from raymaml.seeding import bit_stream, draw_without_replacement
from raymaml.statistics.intervals import Interval, wilson_interval
from raymaml.training.at_once import judging_at_once
from raymaml.training.tensor_file import weights_bytes
from raymaml.training.trained import TrainedModel
from raymaml.types import Fast

BATCH = 16
"""Images in a pass of an inductive model. Some kernels round by the size of the batch, so that the
last batch is filled up to it."""
MOST_FOLDS = 50
Pixels = NDArray[np.uint8]
"""[n, H, W, C], as ``Preprocessing.pixels`` gives them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adaptation:
    """Adapted weights, and the model that they belong to."""

    trained: TrainedModel
    fast: Fast
    shots: tuple[int, ...]
    """Support images of each class."""

    @property
    def is_transductive(self) -> bool:
        """Whether the answer for an image depends on the images that are judged with it."""
        return self.trained.config.model.is_transductive

    @property
    def digest(self) -> str:
        """SHA-256 of the adapted weights."""
        return hashlib.sha256(weights_bytes(self.fast.params | self.fast.buffers)).hexdigest()

    def to(self, device: torch.device) -> Adaptation:
        """Return the same on ``device``; the model moves there as well."""
        self.trained.learner.model.to(device)
        params, buffers = (
            {name: value.to(device) for name, value in tensors.items()}
            for tensors in (self.fast.params, self.fast.buffers)
        )
        return replace(self, fast=replace(self.fast, params=params, buffers=buffers))

    def probabilities(self, pixels: Pixels, group: int | None = None) -> NDArray[np.float64]:
        """Return the probabilities of the classes, [n, N].

        Args:
            pixels: of the images.
            group: images that a transductive model judges together; None: all.

        Raises:
            UserError: a probability is not finite.
        """
        size = (group or len(pixels)) if self.is_transductive else BATCH
        found = np.empty((len(pixels), len(self.shots)))
        for first in range(0, len(pixels), max(size, 1)):
            images = _tensor(self.trained, pixels[first : first + size])
            count = len(images)
            if not self.is_transductive:
                images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, size - count))
            logits = query_logits(self.trained.learner, self.fast, images)[:count]
            found[first : first + count] = logits.double().softmax(1).cpu().numpy()
        if not np.isfinite(found).all():
            raise _not_finite("probabilities")
        return found


class LeaveOneOut(NamedTuple):
    """How often a support image is recognised by an adaptation to the others."""

    accuracy: float
    interval: Interval
    """Of Wilson 1927, at 95%."""
    folds: int
    """Number of the support images that were left out, one after the other."""


def adapt(trained: TrainedModel, pixels: Pixels, numbers: NDArray[np.int64]) -> Adaptation:
    """Adapt to images of the classes ``numbers``, [n] in 0..N-1.

    Raises:
        UserError: the adapted weights are not finite.
    """
    images = _tensor(trained, pixels)
    fast = adapted(trained.learner, images, torch.from_numpy(numbers).to(images.device))
    if not all(bool(value.isfinite().all()) for value in fast.params.values()):
        raise _not_finite("the adapted weights")
    return Adaptation(trained=trained, fast=fast, shots=tuple(np.bincount(numbers).tolist()))


def leave_one_out(
    trained: TrainedModel, pixels: Pixels, numbers: NDArray[np.int64], seed: int
) -> LeaveOneOut | None:
    """Predict each image, or ``MOST_FOLDS`` drawn by the seed, by an adaptation to all others.

    A transductive model judges it together with the others; any other model judges it alone. Copies
    of an image within a class count once: none is judged by its own copy.

    Returns:
        None where a class has one image, so that nothing can be estimated.

    Raises:
        UserError: a logit is not finite.
    """
    pairs = zip(numbers.tolist(), pixels, strict=True)
    last = {(way, image.tobytes()): index for index, (way, image) in enumerate(pairs)}
    unlike = sorted(last.values())
    pixels, numbers = pixels[unlike], numbers[unlike]
    if np.bincount(numbers).min() < 2:
        return None
    folds = min(len(numbers), MOST_FOLDS)
    bits = bit_stream(seed, "leave-one-out")
    drawn = sorted(draw_without_replacement(bits, len(numbers), folds).tolist())
    config, images = trained.config, _tensor(trained, pixels)
    labels, left_out = (torch.as_tensor(each, device=images.device) for each in (numbers, drawn))

    def judged(rows: range) -> list[Tensor]:
        asked = left_out[rows.start : rows.stop]
        among = config.model.is_transductive
        return list(fold_logits(trained.learner, images, labels, asked, among=among))

    at_once = judging_at_once(config.cluster, config.test_inner, images.device)
    logits = torch.stack(list(at_once.apply(folds, judged)))  # [folds, N]
    if not bool(logits.isfinite().all()):
        raise _not_finite("logits of a left-out image")
    right = int((logits.argmax(1) == labels[left_out]).sum())
    interval = wilson_interval(right, folds)
    return LeaveOneOut(interval.mean, interval, folds)


def _not_finite(values: str) -> UserError:
    return UserError(
        f"evaluation.inner: {values} are not finite", remedy="take a lower rate, or fewer steps"
    )


def _tensor(trained: TrainedModel, pixels: Pixels) -> Tensor:
    device = next(trained.learner.model.parameters()).device
    owned = pixels if pixels.flags.writeable else pixels.copy()
    return trained.preprocessing.tensor(torch.from_numpy(owned).to(device))
