"""The passes of episodes through a model, as functions of weights and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from raymaml.common.errors import UserError
from raymaml.layers import (
    OwnRules,
    Pass,
    PassAware,
    Rules,
    reachable_modules,
    standing_in,
)
from raymaml.meta.gradients import EpisodeLosses
from raymaml.meta.inner_loop import Fast
from raymaml.meta.losses import LossFn, loss_of, require_targets
from raymaml.types import Buffers, Episode, EpisodeBatch, Params


class Passes:
    """Calls a model without changing it; to make one takes as long as a small pass.

    Args:
        model: images ``[B, C, H, W]`` -> logits ``[B, N]``, or whatever -> outputs ``[B, ...]``.
        loss_fn: (outputs, targets) -> loss of one set.
        half_precision: type that convolutions and products are autocast to, if any.
        training: whether passes are those of training, or of evaluation.
        rules: the derivatives that layers with rules of their own give.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn = F.cross_entropy,
        half_precision: torch.dtype | None = None,
        *,
        training: bool = True,
        rules: Rules = "torch",
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._half_precision = half_precision
        self._rules = rules
        self._modules = list(reachable_modules(model).values())
        self._params = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._places = _places(model, self._buffers)
        self._layers = [module for module in self._modules if isinstance(module, PassAware)]
        self._modes = self._modes_of(training)

    def _modes_of(self, training: bool) -> list[bool]:
        """Return the mode of each module in training or evaluation, as the model itself sets it."""
        own = [*self._params.values(), *self._buffers.values()]
        with standing_in(self._modules, {id(value): value for value in own}):
            self._model.train(training)
            return [module.training for module in self._modules]

    def losses(self, episode: Episode | EpisodeBatch, frozen: Params) -> EpisodeLosses:
        """Return the losses of an episode as functions of the parameters that are not ``frozen``.

        For several episodes the losses are sums, and every weight, moment and logit has a leading
        axis E: no episode's loss depends on another's weights. Moments after a support pass are
        constants.
        """
        require_targets(self._loss_fn, episode.support_y)
        several = isinstance(episode, EpisodeBatch)
        loss = partial(loss_of, self._loss_fn, several=several)

        def support(params: Params, buffers: Buffers) -> tuple[Tensor, Buffers]:
            logits, buffers = self.support_logits(
                frozen | params, buffers, episode.support_x, labelled=_labelled(episode)
            )
            return loss(logits, episode.support_y), buffers

        def query(params: Params, buffers: Buffers) -> tuple[Tensor, Tensor]:
            logits = self.query_logits(frozen | params, buffers, episode)
            return loss(logits, episode.query_y), logits

        return EpisodeLosses(support=support, query=query)

    def support_logits(
        self, params: Params, buffers: Buffers, x: Tensor, *, labelled: bool = True
    ) -> tuple[Tensor, Buffers]:
        """Return the logits of a support set, and the moments after the pass, which are
        constants."""
        logits, buffers = self._run("support", params, buffers, x, labelled)
        return logits, {name: value.detach() for name, value in buffers.items()}

    def query_logits(
        self, params: Params, buffers: Buffers, episode: Episode | EpisodeBatch
    ) -> Tensor:
        """Return the query logits, after a context pass if a norm reads one."""
        labelled = _labelled(episode)
        buffers = self.with_context(params, buffers, episode.support_x, labelled=labelled)
        return self.query(params, buffers, episode.query_x, labelled=labelled)

    def with_context(
        self, params: Params, buffers: Buffers, support_x: Tensor, *, labelled: bool = True
    ) -> Buffers:
        """Return the moments for the query pass, after a context pass if a norm reads one."""
        if any(layer.reads_context for layer in self._layers):
            _, buffers = self._run("context", params, buffers, support_x, labelled)
        return buffers

    def query(
        self, params: Params, buffers: Buffers, query_x: Tensor, *, labelled: bool = True
    ) -> Tensor:
        """Return the query logits with moments that are ready."""
        logits, _ = self._run("query", params, buffers, query_x, labelled)
        return logits

    @torch.no_grad()
    def judged(self, fast: Fast, episode: Episode) -> Tensor:
        """Return the query logits at fast weights, without a graph."""
        return self.query_logits(fast.params, fast.buffers, episode)

    def observed(self, fast: Fast, losses: EpisodeLosses) -> Fast:
        """Run the support set once if a norm accumulates moments and no inner step runs it."""
        if not any(layer.accumulates and not layer.outlives_episodes for layer in self._layers):
            return fast
        with torch.no_grad():
            return replace(fast, buffers=losses.support(fast.params, fast.buffers)[1])

    def _run(
        self, current: Pass, params: Params, buffers: Buffers, x: Tensor, labelled: bool = True
    ) -> tuple[Tensor, Buffers]:
        call: Callable[..., tuple[Tensor, Buffers]] = partial(self._call, current, labelled)
        name, value = next(iter(params.items()))
        if value.dim() > self._params[name].dim():  # several episodes, each with its weights
            call = vmap(call, randomness="different")
        half = self._half_precision
        # The autocast cache is off: a derivative would find casts of another pass in it.
        with torch.autocast(x.device.type, half, enabled=half is not None, cache_enabled=False):
            logits, buffers = call(params, buffers, x)
        return logits if half is None else logits.float(), buffers

    def _call(
        self, current: Pass, labelled: bool, params: Params, buffers: Buffers, x: Tensor
    ) -> tuple[Tensor, Buffers]:
        # Buffers are cloned: a layer may change them in place, and the pass may run again.
        stand_ins = {id(self._params[name]): value for name, value in params.items()}
        stand_ins |= {id(self._buffers[name]): value.clone() for name, value in buffers.items()}
        with standing_in(self._modules, stand_ins):
            for module, mode in zip(self._modules, self._modes, strict=True):
                module.training = mode
                if isinstance(module, OwnRules):
                    module.rules = self._rules
                if isinstance(module, PassAware):
                    module.current_pass = current
            logits = self._model(x)
            _require_outputs(logits, len(x), labelled)
            return logits, {name: self._buffer_now(name) for name in buffers}

    def _buffer_now(self, name: str) -> Tensor:
        """Return a buffer as a pass leaves it, which is one tensor at all its places."""
        first, *others = [module._buffers.get(key) for module, key in self._places[name]]
        if first is None or any(other is not first for other in others):
            raise UserError(
                f"model: a forward pass replaces the buffer {name} by None, or at one of its"
                " places alone",
                remedy="change it in place, or register a buffer of its own at each place",
            )
        return first


def _labelled(episode: Episode | EpisodeBatch) -> bool:
    return not episode.support_y.is_floating_point()


def _require_outputs(outputs: object, count: int, labelled: bool) -> None:
    """Check that a model gives outputs ``[count, ...]``, for labels logits ``[count, N]``."""
    if not isinstance(outputs, Tensor):
        found = f"a {type(outputs).__name__}"
    elif (
        outputs.shape[:1] != (count,)
        or (labelled and outputs.dim() != 2)
        or not outputs.is_floating_point()
    ):
        found = f"a tensor of shape {list(outputs.shape)} and type {outputs.dtype}"
    else:
        return
    things, wanted = ("images", "logits") if labelled else ("inputs", "outputs")
    shape = "number of ways" if labelled else "..."
    raise UserError(
        f"model: turns {count} {things} into {found}",
        remedy=f"it must give {wanted}, floating-point numbers of shape [{count}, {shape}]",
    )


def _places(model: nn.Module, buffers: Buffers) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, for each buffer, the modules that hold it and its name in each. A shared buffer has
    several."""
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in buffers}
    names = {id(value): name for name, value in buffers.items()}
    for module in model.modules():
        for key, value in module.named_buffers(recurse=False, remove_duplicate=False):
            places[names[id(value)]].append((module, key))
    return places
