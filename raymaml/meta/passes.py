"""The passes of episodes through a model, as functions of weights and moments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from raymaml.meta.gradients import EpisodeLosses
from raymaml.meta.inner_loop import Fast
from raymaml.passes import OwnRules, Pass, PassAware, Rules
from raymaml.types import Buffers, Episode, EpisodeBatch, Params


class Passes:
    """Calls a model without changing it.

    Args:
        model: images ``[B, C, H, W]`` -> logits ``[B, N]``.
        half_precision: type that convolutions and products are autocast to, if any.
    """

    def __init__(self, model: nn.Module, half_precision: torch.dtype | None = None) -> None:
        self._model = model
        self._half_precision = half_precision
        self._ruled = [module for module in model.modules() if isinstance(module, OwnRules)]
        self._layers = [module for module in model.modules() if isinstance(module, PassAware)]

    def losses(self, episode: Episode | EpisodeBatch, *, rules: Rules = "torch") -> EpisodeLosses:
        """Return the losses that the meta-gradient is made of.

        Of several episodes the losses are sums, and every weight, moment and logit has a leading
        axis E: no episode's loss depends on another's weights.
        """
        for layer in self._ruled:
            layer.rules = rules
        count = len(episode) if isinstance(episode, EpisodeBatch) else 1

        def loss_of(logits: Tensor, labels: Tensor) -> Tensor:  # [..., B, N], [..., B]
            return count * F.cross_entropy(logits.flatten(0, -2), labels.flatten())

        def support(params: Params, buffers: Buffers) -> tuple[Tensor, Buffers]:
            logits, buffers = self._run("support", params, buffers, episode.support_x)
            return loss_of(logits, episode.support_y), buffers

        def query(params: Params, buffers: Buffers) -> tuple[Tensor, Tensor]:
            logits = self.query_logits(params, buffers, episode)
            return loss_of(logits, episode.query_y), logits

        return EpisodeLosses(support=support, query=query)

    def query_logits(
        self, params: Params, buffers: Buffers, episode: Episode | EpisodeBatch
    ) -> Tensor:
        """Pass the query set through, after a look at the support set where a norm needs it."""
        if any(layer.reads_context for layer in self._layers):
            _, buffers = self._run("context", params, buffers, episode.support_x)
        logits, _ = self._run("query", params, buffers, episode.query_x)
        return logits

    def observed(self, fast: Fast, losses: EpisodeLosses) -> Fast:
        """Give norms that accumulate one look at the support set, where no inner step has."""
        if not any(layer.accumulates and not layer.outlives_episodes for layer in self._layers):
            return fast
        with torch.no_grad():
            return replace(fast, buffers=losses.support(fast.params, fast.buffers)[1])

    def _run(
        self, current: Pass, params: Params, buffers: Buffers, x: Tensor
    ) -> tuple[Tensor, Buffers]:
        for layer in self._layers:
            layer.current_pass = current
        call = self._call if x.dim() == 4 else vmap(self._call, randomness="different")
        half = self._half_precision
        # without the cache, in which a derivative would find the casts of another pass
        with torch.autocast(x.device.type, half, enabled=half is not None, cache_enabled=False):
            logits, buffers = call(params, buffers, x)
        return logits if half is None else logits.float(), buffers

    def _call(self, params: Params, buffers: Buffers, x: Tensor) -> tuple[Tensor, Buffers]:
        state = params | buffers
        logits: Tensor = functional_call(self._model, state, (x,))  # keeps ``state`` up to date
        return logits, {name: state[name] for name in buffers}
