"""Norm policies: whose moments normalise which pass (the table in README.md beside this file).

Every layer takes ``[B, C, H, W]``, normalises, and max-pools by ``window x window`` (1: not at
all): the two go together, since the norm is needed at the maxima alone. Buffers carry moments from
the support passes to the query pass; a layer replaces them and never changes them in place.
``raymaml.passes.forward`` gives each pass the buffers of its own episode, so episodes stay apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.layers import PassAware, row_of_step
from raymaml.models.closed_rules.batch_norm import all_positive, batch_norm
from raymaml.models.closed_rules.duals import max_pool


class ScaledNorm2d(PassAware):
    """Scale and shift by channel, which every policy but ``none`` has.

    A layer that accumulates moments or reads a context has buffers for them, with the reset values
    mean 0 and variance 1. ``weight``, ``bias`` and the moments are [C], or [T, C] with a row an
    inner step (Antoniou et al. 2019, MAML++).

    Args:
        num_channels: C of the input.
        eps: added to the variance.
        momentum: weight of the newest batch in accumulated moments.
    """

    weight: nn.Parameter | None
    """None: shift alone."""
    mean: Tensor
    var: Tensor
    kept: Tensor
    """Weight that the starting moments still have, (1 - momentum) ** batches: [] or [T, 1]."""

    def __init__(self, num_channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        if self.accumulates or self.reads_context:
            lasting = self.outlives_episodes
            self.register_buffer("mean", torch.zeros(num_channels), persistent=lasting)
            self.register_buffer("var", torch.ones(num_channels), persistent=lasting)
            self.register_buffer("kept", torch.ones(()), persistent=False)

    def _of_step(self, value: Tensor) -> Tensor:
        """Return the row of the inner step, of later ones the last; [C] is every step's."""
        return value[row_of_step(value, self.inner_step)] if value.dim() > 1 else value

    def given(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean and variance, [C], by which this pass normalises, if they are constants;
        None: by its batch."""
        return None

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        if (moments := self.given()) is not None:
            return self._by_constants(x, *moments, window)
        return self._accumulate(x, window) if self.accumulates else self._by_batch(x, window)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the inner step, [C]."""
        bias = self._of_step(self.bias)
        return torch.ones_like(bias) if self.weight is None else self._of_step(self.weight), bias

    def _keep(self, **moments: Tensor) -> None:
        """Replace moments of the inner step by new ones, [C]."""
        for name, new in moments.items():
            old = getattr(self, name)
            at = row_of_step(old, self.inner_step) if old.dim() > 1 else None
            setattr(
                self, name, new if at is None else torch.cat([old[:at], new[None], old[at + 1 :]])
            )

    def _by_batch(self, x: Tensor, window: int) -> Tensor:
        """Normalise by the moments of the batch over B, H and W."""
        weight, bias = self._affine()
        if self._goes_by_own_rules(x):
            return batch_norm(x, weight, bias, self.eps, window)[0]
        x = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        return max_pool(x, window, self.rules)

    def _by_constants(self, x: Tensor, mean: Tensor, var: Tensor, window: int) -> Tensor:
        """Normalise by given moments, [C], which are not differentiated."""
        if self._goes_by_own_rules(x):
            return self._by(x, mean, var, window)
        x = F.batch_norm(x, mean, var, *self._affine(), eps=self.eps)
        return max_pool(x, window, self.rules)

    def _goes_by_own_rules(self, x: Tensor) -> bool:
        """Whether to avoid PyTorch's channels-last kernels, which lose two digits."""
        return self.rules == "closed" and x.is_contiguous(memory_format=torch.channels_last)

    def _by(self, x: Tensor, mean: Tensor, var: Tensor, window: int) -> Tensor:
        """Normalise by given moments, [C] or [B, C], differentiable in them as well."""
        weight, bias = self._affine()
        scale = weight * torch.rsqrt(var + self.eps)
        # Where no weight is negative, the maximum can go first: a quarter is left to scale.
        first = window > 1 and self.rules == "closed" and all_positive(weight)
        x = max_pool(x, window, self.rules) if first else x
        x = x * scale[..., None, None] + (bias - mean * scale)[..., None, None]
        return x if first else max_pool(x, window, self.rules)

    def _accumulate(self, x: Tensor, window: int) -> Tensor:
        """Normalise by the batch, and move the moments toward it (the variance by n - 1)."""
        if self.current_pass == "context":  # which another layer asks for
            return self._by_batch(x, window)
        weight, bias = self._affine()
        if self._goes_by_own_rules(x):
            out, batch_mean, batch_var = batch_norm(x, weight, bias, self.eps, window)
            self.absorb(batch_mean, batch_var, x.numel() // x.shape[1])
            return out
        mean, var = self._of_step(self.mean).clone(), self._of_step(self.var).clone()
        out = F.batch_norm(x, mean, var, weight, bias, True, momentum=self.momentum, eps=self.eps)
        self._keep(mean=mean, var=var, kept=self._of_step(self.kept) * (1 - self.momentum))
        return max_pool(out, window, self.rules)

    def absorb(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the accumulated moments toward those of a batch, [C], of ``count`` pixels."""
        self._keep(
            mean=self._of_step(self.mean).lerp(mean, self.momentum),
            var=self._of_step(self.var).lerp(var * (count / (count - 1)), self.momentum),
            kept=self._of_step(self.kept) * (1 - self.momentum),
        )


class TransductiveNorm2d(ScaledNorm2d):
    """Each pass by its own batch, as in the MAML paper: predictions depend on the other queries."""


class RunningNorm2d(ScaledNorm2d):
    """Global moments, accumulated over the support passes of all training.

    In training the support pass uses its batch; every other pass uses the global moments.
    """

    accumulates = True
    outlives_episodes = True

    def given(self) -> tuple[Tensor, Tensor] | None:
        """Return the global moments, but for a support pass of training."""
        if self.training and self.current_pass == "support":
            return None
        return self._of_step(self.mean), self._of_step(self.var)


class EpisodicNorm2d(ScaledNorm2d):
    """Moments of the episode alone, accumulated over its support passes.

    Without the share of the starting values, mean 0 and variance 1, as Adam corrects its averages
    (Kingma and Ba 2015).
    """

    accumulates = True
    biased = False

    def given(self) -> tuple[Tensor, Tensor] | None:
        """Return the episode's moments for a query pass."""
        if self.current_pass != "query":
            return None
        if self.biased:
            return self.mean, self.var
        seen = 1 - self.kept
        return self.mean / seen, (self.var - self.kept) / seen


class BiasedEpisodicNorm2d(EpisodicNorm2d):
    """With that share, (1 - momentum)^T after T inner steps (59% after 5), as the reference."""

    biased = True


class ContextNorm2d(ScaledNorm2d):
    """Queries by the moments of the support set at the adapted weights, in the graph (MetaBN)."""

    reads_context = True

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        if self.current_pass == "support":
            return self._by_batch(x, window)
        if self.current_pass == "context":
            self.mean, self.var = _moments(x, (0, 2, 3))
        return self._by(x, self.mean, self.var, window)


class TaskNorm2d(ScaledNorm2d):
    """TaskNorm (Bronskill et al. 2020, section 4.3): context moments mixed with an image's own.

    Both passes use ``alpha * context + (1 - alpha) * own``, pooled, with
    ``alpha = sigmoid(alpha_scale * |context| + alpha_offset)`` meta-learned and not adapted; the
    context is the support set at the weights of the pass.
    """

    reads_context = True
    own_dims: tuple[int, ...] = (2, 3)
    """Axes of an image's own moments: those of TaskNorm-I."""
    size: Tensor

    def __init__(self, num_channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_channels, eps, momentum)
        self.alpha_scale = nn.Parameter(torch.zeros(()))
        self.alpha_offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("size", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        if self.current_pass == "query":
            return self._mixed(x, self.mean, self.var, self.size, window)
        mean, var = _moments(x, (0, 2, 3))
        size = x.new_full((), float(x.shape[0]))
        if self.current_pass == "context":
            self.mean, self.var, self.size = mean, var, size
        return self._mixed(x, mean, var, size, window)

    def _mixed(self, x: Tensor, mean: Tensor, var: Tensor, size: Tensor, window: int) -> Tensor:
        """Normalise by the moments of the mixture; ``mean``, ``var`` [C] are the context's."""
        own_mean, own_var = _moments(x, self.own_dims)  # [B, C] or [B, 1]
        alpha = torch.sigmoid(self.alpha_scale * size + self.alpha_offset)
        mixed = alpha * mean + (1 - alpha) * own_mean
        # the variance of a mixture: that within its parts and that between their means
        within = alpha * var + (1 - alpha) * own_var
        var = within + alpha * (1 - alpha) * (mean - own_mean) ** 2
        return self._by(x, mixed, var, window)


class LayerTaskNorm2d(TaskNorm2d):
    """TaskNorm-L: an image's own moments are those of all its channels."""

    own_dims = (1, 2, 3)


class ReferenceTaskNorm2d(TaskNorm2d):
    """The reference's variant of TaskNorm-I: support by its batch, queries by a mixture.

    The mixture is of the episode's accumulated (biased, not differentiated) moments and the
    query's own; the context's size is that of the support batch.
    """

    accumulates = True
    reads_context = False

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        if self.current_pass == "query":
            return self._mixed(x, self.mean, self.var, self.size, window)
        self.see(x)
        return self._accumulate(x, window)

    def see(self, x: Tensor) -> None:
        """Take note of the number of images."""
        self.size = x.new_full((), float(x.shape[0]))


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and variance (by n) of ``[B, C, H, W]`` over ``dims``: [C], [B, C] or [B, 1].

    Not ``torch.var_mean``: in the channels-last layout that takes 20 times as long.
    """
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    mean, var = mean[..., 0, 0], var[..., 0, 0]
    return (mean[0], var[0]) if 0 in dims else (mean, var)


class InstanceNorm2d(ScaledNorm2d):
    """Each image by its own moments, a channel at a time."""

    own_dims: tuple[int, ...] = (2, 3)

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        if self.rules != "torch":  # group_norm has no forward derivative of its gradient
            return self._by(x, *_moments(x, self.own_dims), window)
        groups = 1 if 1 in self.own_dims else x.shape[1]
        x = F.group_norm(x, groups, *self._affine(), self.eps)
        return max_pool(x, window, self.rules)


class LayerNorm2d(InstanceNorm2d):
    """Each image by its own moments, over all channels."""

    own_dims = (1, 2, 3)


class NoNorm2d(PassAware):
    """No norm."""

    def __init__(self, num_channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Max-pool alone."""
        return max_pool(x, window, self.rules)
