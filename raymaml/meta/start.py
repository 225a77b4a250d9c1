"""Where an episode starts, and the way back from there: gradients in theta, running moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig
from raymaml.layers import PassAware
from raymaml.meta.fitting import Head
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.inner_loop import Fast
from raymaml.meta.losses import LossFn
from raymaml.meta.rules import learning_rate
from raymaml.types import Buffers, Episode, EpisodeBatch, Params


def begin(
    model: nn.Module,
    head: Head,
    episode: Episode | EpisodeBatch,
    frozen: Set[str],
    inner: InnerConfig,
) -> tuple[Params, Fast]:
    """Return the frozen parameters, and those that adapt, at rest; of a batch a copy an episode.

    Raises:
        UserError: gradients cannot be computed here, or the head does not fit the labels.
    """
    _require_gradients(episode)
    _require_rows(model, head, episode)
    params = {
        name: _head_start(head, value, episode) if head.holds(name) else value
        for name, value in model.named_parameters()
    }
    # cloned: a layer of the user may change its buffers in place
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if isinstance(episode, EpisodeBatch):
        params, buffers = _repeated(params, len(episode)), _repeated(buffers, len(episode))
    adapting = {name: value for name, value in params.items() if name not in frozen}
    fixed = {name: value.detach() for name, value in params.items() if name in frozen}
    moving = adapting if inner.momentum else {}
    velocity = {name: torch.zeros_like(value) for name, value in moving.items()}
    rates = {name: learning_rate(name, inner, head.name) for name in adapting}
    return fixed, Fast(params=adapting, velocity=velocity, buffers=buffers, rates=rates)


def _require_gradients(episode: Episode | EpisodeBatch) -> None:
    if torch.is_inference_mode_enabled():
        raise UserError(
            "torch.inference_mode: an episode is adapted by gradients, which do not exist in it",
            remedy="call outside of it, or use torch.no_grad()",
        )
    for name, value in vars(episode).items():
        if value.is_inference():
            raise UserError(
                f"{name}: was made in torch.inference_mode, and PyTorch keeps such a tensor out of"
                " gradients",
                remedy=f"make it outside, or give {name}.clone()",
            )


def _require_rows(model: nn.Module, head: Head, episode: Episode | EpisodeBatch) -> None:
    labels = episode.support_y
    # Only where it costs nothing: each step of training would wait for a GPU.
    if head.start != "learned" or labels.device.type != "cpu" or isinstance(labels, FakeTensor):
        return
    rows = len(model.get_parameter(f"{head.name}.weight"))
    ways = _num_ways(episode, rows)
    if ways != rows:
        raise UserError(
            f"{head.name}: has {rows} rows and the episode {ways} classes",
            remedy=f"build the model with num_ways={ways}, or give a head that starts at zero or"
            " is shared",
        )


def _head_start(head: Head, value: Tensor, episode: Episode | EpisodeBatch) -> Tensor:
    """Return where a parameter of the head, [rows, ...], starts in the episode."""
    if head.start == "learned":
        return value
    ways = _num_ways(episode, len(value))
    if head.start == "zero":
        return value.new_zeros(ways, *value.shape[1:])
    return value.repeat(ways, *([1] * (value.ndim - 1)))


def _num_ways(episode: Episode | EpisodeBatch, rows: int) -> int:
    """Return the number of classes; targets that are no labels leave the head its rows."""
    labels = episode.support_y
    return rows if labels.is_floating_point() else int(labels.max()) + 1


def _repeated(values: Params, count: int) -> Params:
    """Copy each tensor ``count`` times along a leading axis E."""
    return {name: value.repeat(count, *([1] * value.dim())) for name, value in values.items()}


def in_parameters(model: nn.Module, head: Head, grads: Params) -> Params:
    """Turn gradients in the start of an episode into gradients in the model's parameters."""

    def of(name: str) -> Tensor:
        if head.start == "shared" and head.holds(name):
            rows = -2 if name.endswith("weight") else -1  # of [E, N, features] or [E, N]
            return grads[name].sum(rows, keepdim=True)
        return grads[name]

    return {name: of(name) for name, _ in model.named_parameters()}


def apart(batch: EpisodeGradient, targets: Tensor, loss_fn: LossFn) -> list[EpisodeGradient]:
    """Take the results of a batch apart, an episode each.

    Args:
        batch: each tensor with a leading axis E; its loss is the sum.
        targets: ``[E, Q, ...]``, by which each episode has its own loss.
        loss_fn: (outputs, targets) -> loss of an episode.
    """
    return [
        EpisodeGradient(
            loss=loss_fn(batch.logits[number], targets[number]).detach(),
            logits=batch.logits[number],
            grads={name: value[number] for name, value in batch.grads.items()},
            buffers={name: value[number] for name, value in batch.buffers.items()},
        )
        for number in range(len(targets))
    ]


def running_layers(model: nn.Module) -> dict[str, PassAware]:
    """Return the layers by name whose moments outlive episodes (norm policy ``running``)."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PassAware) and module.outlives_episodes
    }


def running_moments(model: nn.Module, buffers: Buffers) -> Buffers:
    """Pick the running moments out of all buffers."""
    layers = running_layers(model)
    return {name: value for name, value in buffers.items() if name.rpartition(".")[0] in layers}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the running moments back, after the block, to their values before it."""
    moments = running_moments(model, dict(model.named_buffers()))
    before = {name: value.clone() for name, value in moments.items()}
    try:
        yield
    finally:
        for name, value in moments.items():
            value.copy_(before[name])


@torch.no_grad()
def absorb(model: nn.Module, episodes: Sequence[Buffers]) -> None:
    """Move the running moments as if the episodes had moved them one after the other.

    An exponential average is linear in its start: an episode takes the moments ``m`` to
    ``kept * m + b``, where ``b`` depends on its own images alone. So episodes that all started
    from the model's moments can follow one another, in their order, on any worker. Moments with a
    row an inner step, [T, C], have one ``kept`` a row, [T, 1].

    Args:
        model: changed in place.
        episodes: ``mean``, ``var`` and ``kept`` of each layer after each episode.
    """
    for layer_name, layer in running_layers(model).items():
        for name in ("mean", "var"):
            before = getattr(layer, name)
            now = before.clone()
            for buffers in episodes:
                kept, after = buffers[f"{layer_name}.kept"], buffers[f"{layer_name}.{name}"]
                now = kept * now + (after - kept * before)
            before.copy_(now)
