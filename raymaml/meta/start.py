"""Where an episode starts, and the way back from there to gradients in theta."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raymaml.common.memory import MIB, tape_budget
from raymaml.config.inner import InnerConfig
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.inner_loop import Adaptation
from raymaml.meta.objective import query_weights
from raymaml.meta.rules import build_rule
from raymaml.passes.batches import drawn_batches
from raymaml.passes.fitting import Head, num_ways, require_gradients, require_rows
from raymaml.passes.forward import Passes
from raymaml.passes.losses import LossFn
from raymaml.types import Buffers, Episode, EpisodeBatch, Fast, Params, leaves


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where an episode starts: leaves, and the head as a function of them."""

    theta: Params
    """The model's parameters, of a batch a copy an episode, as leaves."""
    heads: Params
    """The parameters of the head at the start; prototypes are a graph on ``theta``."""
    buffers: Buffers

    def params(self, names: Iterable[str]) -> Params:
        """Return where the parameters ``names`` start, as leaves."""
        return {
            name: leaves({name: self.heads[name]})[name] if name in self.heads else self.theta[name]
            for name in names
        }


def begin(
    passes: Passes,
    head: Head,
    episode: Episode | EpisodeBatch,
    frozen: Set[str],
    inner: InnerConfig,
    *,
    learned: Params,
    outer_step: int | None = None,
) -> tuple[Start, Adaptation]:
    """Return where an episode starts, and its adaptation; of a batch with a copy an episode.

    Args:
        passes: of the model.
        head: its head.
        episode: one, or several.
        frozen: names of the parameters that do not adapt.
        inner: the inner loop.
        learned: the tensors that its rule learns.
        outer_step: decides how query losses weigh; None: the last alone.

    Raises:
        UserError: gradients cannot be computed here, or the head or the batches do not fit.
    """
    start, rule = _start(passes, head, episode), build_rule(inner)
    fixed = start.params(frozen)
    params = start.params(name for name in start.theta if name not in frozen)
    if isinstance(episode, EpisodeBatch):
        learned = repeated(learned, len(episode))
    batches = drawn_batches(episode, inner.support_batch_size, inner.num_steps)
    support, query = passes.losses(episode, fixed, batches)
    memory = inner.tape_memory
    budget = tape_budget(episode.support_x.device) if memory == "auto" else memory * MIB
    return start, Adaptation(
        start=Fast(params=params, state=rule.init(params), buffers=start.buffers),
        support=support,
        query=query,
        derivatives=passes.derivatives(episode, fixed, batches, (support, query), budget),
        frozen=fixed,
        learned=leaves(learned),
        rule=rule,
        inner=inner,
        head=head.name,
        weights=query_weights(inner, outer_step),
        several=isinstance(episode, EpisodeBatch),
    )


def _start(passes: Passes, head: Head, episode: Episode | EpisodeBatch) -> Start:
    model = passes.model
    require_gradients(episode)
    require_rows(model, head, episode)
    params: Params = dict(model.named_parameters())
    # cloned: a layer of the user may change its buffers in place
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    heads = {
        name: _head_start(head, value.detach(), episode)
        for name, value in params.items()
        if head.holds(name) and head.start != "learned"
    }
    if isinstance(episode, EpisodeBatch):
        params, buffers, heads = (repeated(each, len(episode)) for each in (params, buffers, heads))
    theta = leaves(params)
    if head.start == "prototypes":
        encoder = {name: value for name, value in theta.items() if not head.holds(name)}
        features = passes.features(encoder | heads, buffers, episode.support_x, head.name)
        weight, bias = prototypes(features, episode.support_y, num_ways(episode, 0))
        heads = {f"{head.name}.weight": weight, f"{head.name}.bias": bias}
    return Start(theta=theta, heads=heads, buffers=buffers)


def adapting_rows(model: nn.Module, head: Head, frozen: Set[str]) -> Params:
    """Return the parameters that adapt; of a head that has no rows of its own, one row."""
    one = head.start != "learned"
    return {
        name: value.detach()[:1] if one and head.holds(name) else value.detach()
        for name, value in model.named_parameters()
        if name not in frozen
    }


def prototypes(features: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Return the head of Proto-MAML (Triantafillou et al. 2020, section 3): of class means c the
    weights 2c and biases -|c|^2.

    Its logits are negative squared distances to the means, up to a number that all classes share.

    Args:
        features: ``[..., S, F]``.
        labels: ``[..., S]``, 0..N-1.
        ways: number of classes (N).

    Returns:
        ``[..., N, F]`` and ``[..., N]``.
    """
    members = labels[..., None] == torch.arange(ways, device=labels.device)  # [..., S, N]
    members = members.to(features.dtype)
    means = members.mT @ features / members.sum(-2)[..., None]
    return 2 * means, -means.square().sum(-1)


def _head_start(head: Head, value: Tensor, episode: Episode | EpisodeBatch) -> Tensor:
    """Return where a parameter of the head, [rows, ...], starts in the episode, but for
    prototypes."""
    ways = num_ways(episode, len(value))
    if head.start == "shared":
        return value.repeat(ways, *([1] * (value.ndim - 1)))
    return value.new_zeros(ways, *value.shape[1:])


def repeated(values: Params, count: int) -> Params:
    """Copy each tensor ``count`` times along a leading axis E."""
    return {name: value.repeat(count, *([1] * value.dim())) for name, value in values.items()}


def in_parameters(head: Head, start: Start, grads: Params) -> Params:
    """Turn gradients in the start of an episode into gradients in the model's parameters, and in
    the rule's."""
    found = {name: grads[name] for name in start.theta} | grads  # in the order of the model
    if head.start == "prototypes":
        heads = list(start.heads.values())
        wanted = [name for name in start.theta if not head.holds(name)]
        along = [grads[name] for name in start.heads]
        leaves_ = [start.theta[name] for name in wanted]
        more = torch.autograd.grad(heads, leaves_, along, allow_unused=True, materialize_grads=True)
        found |= {name: found[name] + value for name, value in zip(wanted, more, strict=True)}
    if head.start == "shared":
        for name in start.heads:
            rows = -2 if name.endswith("weight") else -1  # of [E, N, features] or [E, N]
            found[name] = grads[name].sum(rows, keepdim=True)
    return found


def apart(batch: EpisodeGradient, targets: Tensor, loss_fn: LossFn) -> list[EpisodeGradient]:
    """Take the results of a batch apart, an episode each.

    Args:
        batch: each tensor with a leading axis E; its loss is the sum.
        targets: ``[E, Q, ...]``, by which each episode has its own loss.
        loss_fn: (outputs, targets) -> loss of an episode.
    """
    return [
        EpisodeGradient(
            loss=_loss(batch, number, targets[number], loss_fn),
            logits=batch.logits[number],
            grads={name: value[number] for name, value in batch.grads.items()},
            buffers={name: value[number] for name, value in batch.buffers.items()},
            metrics={name: value[number] for name, value in batch.metrics.items()},
        )
        for number in range(len(targets))
    ]


def _loss(batch: EpisodeGradient, number: int, targets: Tensor, loss_fn: LossFn) -> Tensor:
    terms = batch.terms or ((1.0, batch.logits),)
    losses = [weight * loss_fn(logits[number], targets).detach() for weight, logits in terms]
    return sum(losses[1:], losses[0])
