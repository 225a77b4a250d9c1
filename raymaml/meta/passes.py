"""The passes of one episode through a model, as functions of weights and moments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.meta.gradients import EpisodeLosses
from raymaml.meta.inner_loop import Fast
from raymaml.passes import ClosedRules, Pass, PassAware
from raymaml.types import Buffers, Episode, Params


class Passes:
    """Calls a model without changing it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ruled = [module for module in model.modules() if isinstance(module, ClosedRules)]
        self._layers = [module for module in model.modules() if isinstance(module, PassAware)]

    def losses(self, episode: Episode, *, closed_rules: bool = False) -> EpisodeLosses:
        """Return the losses that the meta-gradient of ``episode`` is made of.

        ``closed_rules``: they are differentiated backward once at most, and maybe forward over it.
        """
        for layer in self._ruled:
            layer.closed_rules = closed_rules

        def support(params: Params, buffers: Buffers) -> tuple[Tensor, Buffers]:
            logits, buffers = self._run("support", params, buffers, episode.support_x)
            return F.cross_entropy(logits, episode.support_y), buffers

        def query(params: Params, buffers: Buffers) -> tuple[Tensor, Tensor]:
            logits = self.query_logits(params, buffers, episode)
            return F.cross_entropy(logits, episode.query_y), logits

        return EpisodeLosses(support=support, query=query)

    def query_logits(self, params: Params, buffers: Buffers, episode: Episode) -> Tensor:
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
        state = params | buffers
        logits: Tensor = functional_call(self._model, state, (x,))  # keeps ``state`` up to date
        return logits, {name: state[name] for name in buffers}
