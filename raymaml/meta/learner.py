"""The meta-learner: a model, where each episode starts, and how it adapts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.layers import Rules, module_of
from raymaml.meta.adjoint import checkpointed, first_order, mixed_mode
from raymaml.meta.freezing import frozen_params
from raymaml.meta.gradients import EpisodeGradient, Method, reptile, rule_names, unrolled
from raymaml.meta.implicit import implicit
from raymaml.meta.inner_loop import Adaptation, unroll
from raymaml.meta.rules import learned_tensors
from raymaml.meta.start import Start, adapting_rows, apart, begin, in_parameters
from raymaml.passes.calls import Guarded, alone
from raymaml.passes.fitting import Head, HeadStart, adaptation_table, require_fitting, require_reach
from raymaml.passes.forward import Passes
from raymaml.passes.losses import LossFn
from raymaml.passes.moments import absorb, restored, running_moments
from raymaml.types import Buffers, Episode, EpisodeBatch, Fast, Params

METHODS: dict[str, Method] = {
    "auto": checkpointed,  # right for any module; training chooses by model and images
    "unrolled": unrolled,
    "checkpointed": checkpointed,
    "mixed_mode": mixed_mode,
    "first_order": first_order,
    "reptile": reptile,
    "implicit": implicit,
}
"""The methods of ``inner.gradient`` by name."""
METRICS = {"implicit": ("cg_residual", "cg_curvature")}
"""The numbers that a method gives beside the gradient."""
SINGLE_BACKWARD = {"mixed_mode", "first_order", "reptile", "implicit"}
"""These methods differentiate each pass backward at most once, and may differentiate that
forward."""


class MetaLearner(Guarded):
    """MAML over any ``nn.Module``: ``learner(support_x, support_y, query_x)`` adapts and predicts.

    Calls leave the model as it was, and run one after the other, from several threads too; pickle
    it while none runs. Gradients take passes of training and predictions those of evaluation,
    whatever ``train`` and ``eval`` have set.

    Args:
        model: images ``[B, C, H, W]`` -> logits ``[B, N]``; its parameters are the starting point.
            With targets that are no labels, inputs ``[B, ...]`` -> outputs ``[B, ...]``, which are
            then in the place of the logits below.
        inner: the inner loop of training.
        head: name of the module that is the head, such as ``fc``; it has a ``weight``.
        head_start: ``learned`` starts each episode at the model's head; ``zero`` at zeros, which
            are no meta-parameters; ``shared`` at the one row of the model's head, repeated for each
            way; ``prototypes`` at the class means of the support features. None is the model's own
            ``head_start``, which ``build_model`` sets, or ``learned``.
        loss_fn: (outputs, targets) -> the loss of a support or query set, one number.
        test_inner: the inner loop of ``predict`` and ``logits_by_step``; that of training if None.
        channels_last: use the channels-last layout for images. ``unrolled`` and ``checkpointed``
            keep the plain layout: their second backward pass is slower in channels-last, and
            PyTorch's norm loses a digit there. On CPU 1.3 to 4 times faster than the plain layout,
            and rounded differently.
        half_precision: autocast convolutions and products to this type; weights, gradients, sums
            and losses stay as they are.
        seed: decides where learned rates start within ``inner.lr_range``, and a rule's draws.
        kernels: let the model use raymaml's kernels on CPU, where there are some for it and a C++
            compiler, which the first call then runs for a few seconds.

    Raises:
        UserError: a pattern of ``frozen`` matches no parameter, there is no such head, a shared one
            has not one row, a norm keeps moments from episode to episode, or the rule, or the
            method of the meta-gradient, does not fit.
    """

    @alone()
    def __init__(
        self,
        model: nn.Module,
        inner: InnerConfig,
        *,
        head: str = "head",
        head_start: HeadStart | None = None,
        loss_fn: LossFn = F.cross_entropy,
        test_inner: InnerConfig | None = None,
        channels_last: bool = False,
        half_precision: torch.dtype | None = None,
        seed: int = 0,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.model = model
        self.inner = inner
        own: HeadStart = getattr(model, "head_start", "learned")
        self.head = Head(head, head_start or own)
        self.loss_fn = loss_fn
        self.test_inner = inner if test_inner is None else test_inner
        self.channels_last = channels_last
        require_fitting(model, self.head)
        self._frozen = frozen_params("inner.frozen", model, inner.frozen)
        self._test_frozen = frozen_params("evaluation.inner.frozen", model, self.test_inner.frozen)
        self.half_precision = half_precision
        rows = adapting_rows(model, self.head, self._frozen)
        self.rule = module_of(learned_tensors(inner, rows, head, seed))
        still = [name for name in self.params if name in self._frozen]
        require_reach(inner, self.head, still, learns=bool(self.learned))
        if self.learned and self.test_inner.num_steps and self._frozen != self._test_frozen:
            raise UserError(
                "evaluation.inner.frozen: the rule has learned for the parameters that adapt in"
                " training, and others adapt here",
                remedy="leave it out",
            )

    @property
    @alone()
    def params(self) -> Params:
        """The parameters that the outer loop learns (theta), by name: the model's, and the
        rule's as ``rule.NAME``. A head that starts at zero or at prototypes is left out."""
        theta = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and (self.head.has_own_rows or not self.head.holds(name))
        }
        return theta | rule_names(self.learned)

    @property
    def learned(self) -> Params:
        """The tensors that the rule learns, by their names in the rule."""
        return dict(self.rule.named_parameters())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of an episode's gradient."""
        return METRICS.get(self.inner.gradient, ())

    @property
    @alone()
    def moments(self) -> Buffers:
        """The buffers that belong to the model's state, by name; the same tensors."""
        lasting = self.model.state_dict()
        return {name: value for name, value in self.model.named_buffers() if name in lasting}

    @property
    @alone()
    def running_moments(self) -> Buffers:
        """The running moments by name, which an episode gives beside gradients."""
        return running_moments(self.model, dict(self.model.named_buffers()))

    @alone()
    def episode_gradient(self, episode: Episode, outer_step: int | None = None) -> EpisodeGradient:
        """Return query loss, query logits, meta-gradient and running moments of one episode.

        Args:
            episode: one.
            outer_step: for settings of ``inner`` that change with it; None: after all changes.
        """
        method = self.inner.gradient_at(outer_step)
        if method in SINGLE_BACKWARD:
            return self._gradient(self._laid_out(episode), outer_step, method, "closed")
        return self._gradient(episode, outer_step, method, "torch")

    def chunk_gradients(
        self, episodes: EpisodeBatch, outer_step: int | None = None
    ) -> list[EpisodeGradient]:
        """Return ``episode_gradient`` of each episode, all at once by vmap: equal to rounding.

        A model with dropout draws other random numbers than one episode at a time.
        """
        if len(episodes) == 1:
            return [self.episode_gradient(episodes[0], outer_step)]
        method = self.inner.gradient_at(outer_step)
        rules: Rules = "composed" if method in SINGLE_BACKWARD else "torch"
        with alone(several=True):
            found = self._gradient(episodes, outer_step, method, rules)
            return apart(found, episodes.query_y, self.loss_fn)

    @torch.enable_grad()
    def _gradient(
        self, episode: Episode | EpisodeBatch, outer_step: int | None, method: str, rules: Rules
    ) -> EpisodeGradient:
        passes = Passes(
            self.model,
            self.loss_fn,
            self.half_precision,
            rules=rules,
            kernels=self.kernels and rules != "torch",
        )
        start, adaptation = self._begun(passes, episode, self.inner, self._frozen, outer_step)
        if self.inner.num_steps == 0:
            seen = passes.observed(adaptation.start, adaptation.support)
            adaptation = replace(adaptation, start=seen)
        result = METHODS[method](adaptation)
        return replace(
            result,
            grads=in_parameters(self.head, start, result.grads),
            buffers=running_moments(self.model, result.buffers),
        )

    def adaptation(self, episode: Episode, inner: InnerConfig) -> Adaptation:
        """Return the adaptation to an episode in training, by another inner loop."""
        passes = Passes(self.model, self.loss_fn, self.half_precision)
        return self._begun(passes, episode, inner, self._frozen)[1]

    def _begun(
        self,
        passes: Passes,
        episode: Episode | EpisodeBatch,
        inner: InnerConfig,
        frozen: Set[str],
        outer_step: int | None = None,
    ) -> tuple[Start, Adaptation]:
        return begin(
            passes, self.head, episode, frozen, inner, learned=self.learned, outer_step=outer_step
        )

    @alone()
    def meta_gradient(
        self,
        episodes: EpisodeBatch,
        *,
        update_moments: bool = False,
        outer_step: int | None = None,
        at_once: int = 1,
    ) -> tuple[Tensor, Tensor, Params]:
        """Return mean query loss, logits ``[E, N*Q, N]`` and the gradient of that loss by name.

        The names are those of all parameters of the model: of a head that starts at zero as well,
        although it is no meta-parameter.

        Args:
            episodes: of one shape.
            update_moments: True keeps the running moments (norm policy ``running``) that these
                episodes produce, one after the other. Use it once an outer step. False leaves the
                model unchanged.
            outer_step: for settings of ``inner`` that change with it; None: after all changes.
            at_once: episodes that ``chunk_gradients`` takes together, which is faster where each is
                small, and on a GPU. Those together start from the same running moments.
        """
        results: list[EpisodeGradient] = []
        with nullcontext() if update_moments else restored(self.model):
            for chunk in episodes.chunks(at_once):
                found = self.chunk_gradients(chunk, outer_step)
                self.absorb([each.buffers for each in found])
                results += found
        grads = {
            name: torch.stack([result.grads[name] for result in results]).mean(0)
            for name in results[0].grads
        }
        loss = torch.stack([result.loss for result in results]).mean()
        return loss, torch.stack([result.logits for result in results]), grads

    @alone()
    def backward(
        self, episodes: EpisodeBatch, outer_step: int | None = None, *, at_once: int = 1
    ) -> Tensor:
        """Add the gradient of the mean query loss to ``.grad`` of ``params``; return that loss.

        The running moments (norm policy ``running``) move, as in any training pass. For
        ``outer_step`` and ``at_once`` see ``meta_gradient``.
        """
        loss, _, grads = self.meta_gradient(
            episodes, update_moments=True, outer_step=outer_step, at_once=at_once
        )
        for name, parameter in self.params.items():
            before = parameter.grad
            parameter.grad = grads[name] if before is None else before.add_(grads[name])
        return loss

    @alone()
    def absorb(self, buffers: Sequence[Buffers]) -> None:
        """Move the running moments by episodes that started from them, in order."""
        absorb(self.model, buffers)

    def adapt(self, episode: Episode) -> Iterator[Fast]:
        """Yield the fast weights after 0..T inner steps of ``test_inner``, without a graph."""
        with alone():
            states = self._adapted(self.passes_of_test(), episode)
        while True:
            with alone():  # and nobody waits while the caller has the weights
                fast = next(states, None)
            if fast is None:
                return
            yield fast

    def logits_by_step(self, episode: Episode | EpisodeBatch) -> Tensor:
        """Return the query logits after 0..T inner steps: ``[T+1, N*Q, N]``; of several episodes,
        all at once and equal to rounding, ``[E, T+1, N*Q, N]``."""
        return self._logits(episode)

    def predict(self, episodes: EpisodeBatch, *, at_once: int = 1) -> Tensor:
        """Adapt to each support set and return the query logits ``[E, N*Q, N]``.

        For ``at_once`` see ``meta_gradient``; results are equal to rounding.
        """
        found = [self._logits(chunk, last=True)[:, 0] for chunk in episodes.chunks(at_once)]
        return torch.cat(found)

    def _logits(self, episode: Episode | EpisodeBatch, *, last: bool = False) -> Tensor:
        """Return the query logits by inner step, or after the last alone."""
        several = isinstance(episode, EpisodeBatch)
        if isinstance(episode, EpisodeBatch) and len(episode) == 1:
            return self._logits(episode[0], last=last)[None]
        with alone(several=several):
            passes, episode = self.passes_of_test(several=several), self._laid_out(episode)
            states: Iterable[Fast] = self._adapted(passes, episode)
            states = deque(states, maxlen=1) if last else states
            return torch.stack([passes.judged(fast, episode) for fast in states], int(several))

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Adapt to one support set and return the query logits ``[N*Q, N]``, without a graph.

        ``backward`` gives the gradient.
        """
        unread = support_y.new_zeros(len(query_x), *support_y.shape[1:])
        sets: Any = {"support_x": support_x, "support_y": support_y, "query_x": query_x}
        return self._logits(Episode(**sets, query_y=unread), last=True)[0]

    @alone()
    def adaptation_table(self) -> str:
        """Lay out which modules adapt in training, and the tensors that the rule learns, with their
        numbers of parameters."""
        return adaptation_table(self.model, self._frozen, self.learned)

    @alone()
    def query_logits(self, fast: Fast, episode: Episode) -> Tensor:
        """Return the query logits ``[N*Q, N]`` at fast weights that ``adapt`` yielded."""
        return self.passes_of_test().judged(fast, episode)

    def passes_of_test(self, *, several: bool = False) -> Passes:
        """Return the passes of evaluation, of an episode or of several at once."""
        closed = self.kernels and self.channels_last and not several
        rules: Rules = "closed" if closed else "torch"
        loss_fn, half, kernels = self.loss_fn, self.half_precision, self.kernels
        return Passes(self.model, loss_fn, half, training=False, rules=rules, kernels=kernels)

    @torch.enable_grad()
    def _adapted(self, passes: Passes, episode: Episode | EpisodeBatch) -> Iterator[Fast]:
        _, adaptation = self._begun(passes, episode, self.test_inner, self._test_frozen)
        for state in unroll(adaptation, create_graph=False):
            fast = state if state.steps else passes.observed(state, adaptation.support)
            yield fast.among(adaptation.frozen)

    def _laid_out(self, episode: Episode | EpisodeBatch) -> Episode | EpisodeBatch:
        if self.channels_last and isinstance(episode, Episode):
            return episode.channels_last()
        return episode
