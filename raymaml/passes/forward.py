"""The passes of episodes through a model, as functions of weights and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from raymaml.passes.batches import rows_of
from raymaml.passes.closed import ByClosedForm, ClosedForm, ClosedPass, InClosedForm, Passing
from raymaml.passes.derivatives import ByAutograd, Derivatives
from raymaml.passes.losses import LossFn, loss_of, require_targets
from raymaml.types import Buffers, Episode, EpisodeBatch, Fast, Params, QueryLoss, SupportLoss


class Passes:
    """Calls a model without changing it; to make one takes as long as a small pass.

    Args:
        model: images ``[B, C, H, W]`` -> logits ``[B, N]``, or whatever -> outputs ``[B, ...]``.
        loss_fn: (outputs, targets) -> loss of one set.
        half_precision: type that convolutions and products are autocast to, if any.
        training: whether passes are those of training, or of evaluation.
        rules: the derivatives that layers with rules of their own give.
        kernels: whether raymaml's kernels are used: by a model that brings passes in closed form,
            and by closed rules.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn = F.cross_entropy,
        half_precision: torch.dtype | None = None,
        *,
        training: bool = True,
        rules: Rules = "torch",
        kernels: bool = False,
    ) -> None:
        self.model = model
        self._loss_fn = loss_fn
        self._half_precision = half_precision
        self._rules, self._kernels, self._training = rules, kernels, training
        self._modules = list(reachable_modules(model).values())
        self._params = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._places = _places(model, self._buffers)
        self._layers = [module for module in self._modules if isinstance(module, PassAware)]
        self._modes = self._modes_of(training)
        fits = loss_fn is F.cross_entropy and half_precision is None
        self._in_closed_form = (
            model if kernels and fits and isinstance(model, InClosedForm) else None
        )
        self._last_closed: tuple[Tensor, Passing | None] | None = None

    def _modes_of(self, training: bool) -> dict[nn.Module, bool]:
        """Return the mode of each module in training or evaluation, as the model itself sets it."""
        if not any(map(_has_own_train, self._modules)):
            registered = set(self.model.modules())
            return {m: training if m in registered else m.training for m in self._modules}
        own = [*self._params.values(), *self._buffers.values()]
        with standing_in(self._modules, {id(value): value for value in own}):
            self.model.train(training)
            return {module: module.training for module in self._modules}

    def losses(
        self, episode: Episode | EpisodeBatch, frozen: Params, batches: Tensor | None = None
    ) -> tuple[SupportLoss, QueryLoss]:
        """Return the losses of an episode as functions of the parameters that are not ``frozen``.

        For several episodes the losses are sums, and every weight, moment and logit has a leading
        axis E: no episode's loss depends on another's weights. Moments after a support pass are
        constants.

        Args:
            episode: one, or several.
            frozen: the other parameters.
            batches: rows of the support set for each inner step, ``[T, B]`` or ``[E, T, B]``; None
                takes all in each.
        """
        require_targets(self._loss_fn, episode.support_y)
        several = isinstance(episode, EpisodeBatch)
        loss = partial(loss_of, self._loss_fn, several=several)

        def support(fast: Fast) -> tuple[Tensor, Buffers]:
            x, y = episode.support_x, episode.support_y
            if batches is not None:
                x, y = (rows_of(each, batches, fast.steps) for each in (x, y))
            params, labelled = frozen | fast.params, _labelled(episode)
            logits, buffers = self.support_logits(params, fast.buffers, x, fast.steps, labelled)
            return loss(logits, y), buffers

        def query(fast: Fast) -> tuple[Tensor, Tensor]:
            logits = self.query_logits(fast.among(frozen), episode)
            return loss(logits, episode.query_y), logits

        return support, query

    def derivatives(
        self,
        episode: Episode | EpisodeBatch,
        frozen: Params,
        batches: Tensor | None,
        losses: tuple[SupportLoss, QueryLoss],
        budget: float,
    ) -> Derivatives:
        """Return the derivatives of ``losses``, which come from the same arguments.

        ``budget`` is the number of bytes of activations that may be kept for them.
        """
        by_autograd = ByAutograd(*losses, frozen)
        if self._in_closed_form is None:
            return by_autograd
        budget = budget if self._training else 0  # evaluation takes no products
        return ByClosedForm(self._closed_passes, episode, frozen, batches, budget, by_autograd)

    def _closed_passes(self, current: Pass, fast: Fast, x: Tensor) -> Passing | None:
        """Return the passes of images in closed form, if the model has them."""
        if (model := self._in_closed_form) is None:
            return None
        form = model.closed_form(current, fast.params, x)
        return None if form is None else partial(self._closed_pass, form, current)

    def _closed_pass(
        self, form: ClosedForm, current: Pass, fast: Fast, order: int
    ) -> tuple[ClosedPass, Buffers]:
        step = fast.steps if current == "support" else fast.last_step
        if not fast.buffers:  # without moments, layers are the same in all passes
            return form(fast.params, step, order), {}
        with self._standing(self._layers, current, step, {}, fast.buffers):
            closed = form(fast.params, step, order)
            return closed, {name: self._buffer_now(name) for name in fast.buffers}

    def support_logits(
        self, params: Params, buffers: Buffers, x: Tensor, step: int = 0, labelled: bool = True
    ) -> tuple[Tensor, Buffers]:
        """Return the logits of a support set in the inner step ``step``, and the moments after the
        pass, which are constants."""
        logits, buffers = self._run("support", step, params, buffers, x, labelled=labelled)
        return logits, {name: value.detach() for name, value in buffers.items()}

    def features(self, params: Params, buffers: Buffers, x: Tensor, head: str) -> Tensor:
        """Return the features ``[B, F]`` that the head gets of a support set before adaptation."""
        return self._run("support", 0, params, buffers, x, head=head)[0]

    def query_logits(self, fast: Fast, episode: Episode | EpisodeBatch) -> Tensor:
        """Return the query logits at all weights, after a context pass if a norm reads one."""
        labelled = _labelled(episode)
        fast = self.with_context(fast, episode.support_x, labelled=labelled)
        return self.query(fast, episode.query_x, labelled=labelled)

    def with_context(self, fast: Fast, x: Tensor, labelled: bool = True) -> Fast:
        """Return ``fast`` with the moments for the query pass, after a context pass over the
        support set ``x`` if a norm reads one."""
        if not any(layer.reads_context for layer in self._layers):
            return fast
        row = fast.last_step
        _, buffers = self._run("context", row, fast.params, fast.buffers, x, labelled=labelled)
        return replace(fast, buffers=buffers)

    def query(self, fast: Fast, x: Tensor, labelled: bool = True) -> Tensor:
        """Return the query logits at all weights, with moments that are ready."""
        if not torch.is_grad_enabled() and (passing := self._passing_of_query(fast, x)) is not None:
            return passing(fast, 0)[0].logits
        row = fast.last_step
        return self._run("query", row, fast.params, fast.buffers, x, labelled=labelled)[0]

    def _passing_of_query(self, fast: Fast, x: Tensor) -> Passing | None:
        """Return ``_closed_passes``, of the same images as in the last call the same."""
        last = self._last_closed
        if last is None or last[0] is not x:
            last = self._last_closed = x, self._closed_passes("query", fast, x)
        return last[1]

    @torch.no_grad()
    def judged(self, fast: Fast, episode: Episode | EpisodeBatch) -> Tensor:
        """Return the query logits at fast weights, without a graph."""
        return self.query_logits(fast, episode)

    def observed(self, fast: Fast, support: SupportLoss) -> Fast:
        """Run the support set once if a norm accumulates moments and no inner step runs it."""
        if not any(layer.accumulates and not layer.outlives_episodes for layer in self._layers):
            return fast
        with torch.no_grad():
            return replace(fast, buffers=support(fast)[1])

    def _run(
        self,
        current: Pass,
        step: int,
        params: Params,
        buffers: Buffers,
        x: Tensor,
        *,
        labelled: bool = True,
        head: str | None = None,
    ) -> tuple[Tensor, Buffers]:
        """Return the logits, or what the head ``head`` gets, and the moments after the pass."""
        call: Callable[..., tuple[Tensor, Buffers]]
        name, value = next(iter(params.items()))
        several = value.dim() > self._params[name].dim()  # episodes, each with its weights
        call = partial(self._call, current, step, several=several, labelled=labelled, head=head)
        if several:
            call = vmap(call, randomness="different")
        half = self._half_precision
        # The autocast cache is off: a derivative would find casts of another pass in it.
        with _autocast(x.device.type, half):
            logits, buffers = call(params, buffers, x)
        return logits if half is None else logits.float(), buffers

    def _call(
        self,
        current: Pass,
        step: int,
        params: Params,
        buffers: Buffers,
        x: Tensor,
        *,
        several: bool,
        labelled: bool,
        head: str | None,
    ) -> tuple[Tensor, Buffers]:
        with self._standing(self._modules, current, step, params, buffers, several=several):
            logits = self.model(x) if head is None else _entering(self.model, head, x)
            _require_outputs(logits, len(x), labelled)
            return logits, {name: self._buffer_now(name) for name in buffers}

    @contextmanager
    def _standing(
        self,
        modules: Sequence[nn.Module],
        current: Pass,
        step: int,
        params: Params,
        buffers: Buffers,
        *,
        several: bool = False,
    ) -> Iterator[None]:
        """Let ``modules`` have the weights, moments and modes of a pass in the block."""
        # Buffers are cloned: a layer may change them in place, and the pass may run again.
        stand_ins = {id(self._params[name]): value for name, value in params.items()}
        stand_ins |= {id(self._buffers[name]): value.clone() for name, value in buffers.items()}
        with standing_in(modules, stand_ins):
            for module in modules:
                own = vars(module)  # to assign attributes of a module takes long
                own["training"] = self._modes[module]
                if isinstance(module, OwnRules):
                    own |= {"rules": self._rules, "kernels": self._kernels, "several": several}
                if isinstance(module, PassAware):
                    own |= {"current_pass": current, "inner_step": step}
            yield

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


def _has_own_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or "train" in vars(module)


def _entering(model: nn.Module, head: str, x: Tensor) -> Tensor:
    """Run the model, and return the features that enter its head."""
    with entering(model, head) as captured:
        model(x)
    return captured[-1]


@contextmanager
def entering(model: nn.Module, head: str) -> Iterator[list[Tensor]]:
    """Give a list to which each pass in the block adds the features that enter the head."""
    captured: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda _head, inputs: captured.append(inputs[0])
    )
    try:
        yield captured
    finally:
        hook.remove()


def _autocast(device: str, half: torch.dtype | None) -> AbstractContextManager[None]:
    """Cast to a type, or not at all: also where the caller casts."""
    if not torch.amp.is_autocast_available(device):  # the meta device
        return nullcontext()
    return torch.autocast(device, half, enabled=half is not None, cache_enabled=False)


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
