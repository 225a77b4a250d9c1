"""The ways to compute one episode: raymaml's methods, plain PyTorch, higher and TorchOpt."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.bench.cases import PHASES, Phase, image_shape, made_up_episode
from raymaml.config.model import InnerConfig
from raymaml.config.schema import Config
from raymaml.layers import PassAware
from raymaml.meta.inner_loop import leaves
from raymaml.meta.learner import METHODS
from raymaml.meta.rules import frozen_params, learning_rate
from raymaml.training.state import build_learner
from raymaml.types import Episode, EpisodeBatch, Params

EXACT_METHODS = tuple(name for name in METHODS if name not in {"auto", "first_order"})
"""The values of ``inner.gradient`` that compute one and the same number."""
Adapted = Iterator[Callable[[Tensor], Tensor]]
"""Yields the adapted model once, as a function of images."""


@contextlib.contextmanager
def _plain(model: nn.Module, episode: Episode, inner: InnerConfig, training: bool) -> Adapted:
    """MAML written down with PyTorch alone."""
    fast: Params = dict(model.named_parameters())
    for _ in range(inner.num_steps):
        fast = fast if training else leaves(fast)
        loss = _support_loss(partial(functional_call, model, fast), episode)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=training)
        fast = {
            name: weight - learning_rate(name, inner) * grad
            for (name, weight), grad in zip(fast.items(), grads, strict=True)
        }
    yield partial(functional_call, model, fast)


@contextlib.contextmanager
def _higher(model: nn.Module, episode: Episode, inner: InnerConfig, training: bool) -> Adapted:
    """``higher.innerloop_ctx`` over ``torch.optim.SGD``."""
    groups = [
        {"params": [weight], "lr": learning_rate(name, inner)}
        for name, weight in model.named_parameters()
    ]
    sgd = torch.optim.SGD(groups, momentum=inner.momentum, weight_decay=inner.weight_decay)
    with importlib.import_module("higher").innerloop_ctx(
        model, sgd, copy_initial_weights=False, track_higher_grads=training
    ) as (adapted, inner_sgd):
        for _ in range(inner.num_steps):
            inner_sgd.step(_support_loss(adapted, episode))
        yield adapted


@contextlib.contextmanager
def _torchopt(model: nn.Module, episode: Episode, inner: InnerConfig, training: bool) -> Adapted:
    """``torchopt.MetaSGD``; in evaluation ``torchopt.SGD``, which changes weights in place."""
    torchopt = importlib.import_module("torchopt")
    options = {"lr": inner.lr, "momentum": inner.momentum, "weight_decay": inner.weight_decay}
    if training:
        start = torchopt.extract_state_dict(model, by="reference")
        meta_sgd = torchopt.MetaSGD(model, **options)
        for _ in range(inner.num_steps):
            meta_sgd.step(_support_loss(model, episode))
        yield model
        torchopt.recover_state_dict(model, start)
    else:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        sgd = torchopt.SGD(model.parameters(), **options)
        for _ in range(inner.num_steps):
            sgd.zero_grad()
            _support_loss(model, episode).backward()
            sgd.step()
        yield model
        model.load_state_dict(state)


def _support_loss(model: Callable[[Tensor], Tensor], episode: Episode) -> Tensor:
    return F.cross_entropy(model(episode.support_x), episode.support_y)


OTHERS: dict[str, Callable[..., contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]]] = {
    "plain": _plain,
    "higher": _higher,
    "torchopt": _torchopt,
}
"""By the name of the library: adapts the model and gives it as a function of images; it leaves the
model as it was. ``plain`` is PyTorch alone."""
_CANNOT = {"plain": ("momentum", "weight_decay"), "higher": (), "torchopt": ("head_lr",)}
"""Options of ``inner`` that the code above, or the library, does not support."""


class Contender:
    """One way to compute the made-up episodes of ``config``; its model stays as it is.

    Args:
        library: ``raymaml``, or one of ``OTHERS``.
        method: One of ``EXACT_METHODS``; evaluation and libraries of ``OTHERS`` ignore it.
        config: The configuration that is measured.
        device: Device of weights and images.
        dtype: Type of weights and images.
    """

    def __init__(
        self,
        library: str,
        method: str,
        *,
        config: Config,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        inner = config.inner.model_copy(update={"gradient": method})
        precision = {} if dtype is torch.float32 else {"precision": "float32"}  # no autocast
        cluster = config.cluster.model_copy(update=precision)
        config = config.model_copy(update={"inner": inner, "cluster": cluster})
        ways = config.episodes.train.num_ways
        self._learner = build_learner(config, image_shape(config), ways, device)
        self.model = self._learner.model.to(dtype)
        self._library, self._config = library, config
        self._episodes = {phase: made_up_episode(config, phase, device, dtype) for phase in PHASES}

    def compute(self, phase: Phase) -> Tensor:
        """Return the second-order meta-gradient, [P], or the logits of the queries, [N*Q * N].

        The gradient is that of the query loss in all parameters of the model.
        """
        torch.manual_seed(0)  # for dropout
        episode = self._episodes[phase]
        if phase == "evaluation":
            return self._logits(episode).reshape(-1)
        grads = self._meta_gradient(episode)
        return torch.cat([grads[name].reshape(-1) for name, _ in self.model.named_parameters()])

    def _meta_gradient(self, episode: Episode) -> Params:
        if self._library == "raymaml":
            return self._learner.episode_gradient(episode).grads
        self.model.train()
        params = dict(self.model.named_parameters())
        adapt = OTHERS[self._library](self.model, episode, self._config.inner, training=True)
        with adapt as adapted:
            loss = F.cross_entropy(adapted(episode.query_x), episode.query_y)
            grads = torch.autograd.grad(loss, list(params.values()))
        return dict(zip(params, grads, strict=True))

    def _logits(self, episode: Episode) -> Tensor:
        if self._library == "raymaml":
            one = EpisodeBatch(**{name: value[None] for name, value in vars(episode).items()})
            return self._learner.predict(one)[0]
        self.model.eval()
        adapt = OTHERS[self._library](self.model, episode, self._config.test_inner, training=False)
        with adapt as adapted, torch.no_grad():
            return adapted(episode.query_x)


def why_not(library: str, config: Config, model: nn.Module) -> str | None:
    """Return why a library of ``OTHERS`` cannot compute an episode of ``config``, or None."""
    if library != "plain" and importlib.util.find_spec(library) is None:
        return "not installed (pip install raymaml[bench])"
    lacks = []
    layers = [layer for layer in model.modules() if isinstance(layer, PassAware)]
    if any(layer.accumulates or layer.reads_context for layer in layers):
        lacks.append(f"model.norm {config.model.norm_text}")
    if config.model.head != "learned":
        lacks.append(f"model.head {config.model.head}")
    for inner in (config.inner, config.test_inner):
        if frozen_params("inner.frozen", model, inner.frozen):
            lacks.append("parameters that do not adapt")
        lacks += [f"inner.{option}" for option in _CANNOT[library] if getattr(inner, option)]
    return f"does without {', '.join(dict.fromkeys(lacks))}" if lacks else None
