"""Who computes the same episode: raymaml's methods, plain PyTorch, higher and TorchOpt."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymaml.bench.cases import image_shape
from raymaml.config.model import InnerConfig
from raymaml.config.schema import Config
from raymaml.layers import PassAware
from raymaml.meta.freezing import frozen_params
from raymaml.meta.inner_loop import leaves
from raymaml.meta.learner import MetaLearner
from raymaml.meta.methods import METHODS
from raymaml.meta.rules import HEAD, learning_rate
from raymaml.training.state import build_learner
from raymaml.types import Episode, EpisodeBatch, Params

EXACT_METHODS = tuple(name for name in METHODS if name not in {"auto", "first_order"})
"""The values of ``inner.gradient`` that compute one and the same number."""


class Contender(Protocol):
    """One way to compute an episode; ``model`` is never changed by one."""

    model: nn.Module

    def meta_gradient(self, episode: Episode) -> Params:
        """Return the second-order gradient of the query loss in all parameters of ``model``."""

    def predict(self, episode: Episode) -> Tensor:
        """Adapt without a graph and return the query logits, ``[N*Q, N]``."""


class Raymaml:
    """raymaml, as it trains and judges."""

    def __init__(self, learner: MetaLearner, config: Config) -> None:
        self.model = learner.model
        self._learner = learner

    def meta_gradient(self, episode: Episode) -> Params:
        """Apply the method of the learner's inner loop."""
        return self._learner.episode_gradient(episode).grads

    def predict(self, episode: Episode) -> Tensor:
        """Adapt by the inner loop of evaluation."""
        one = EpisodeBatch(
            support_x=episode.support_x[None],
            support_y=episode.support_y[None],
            query_x=episode.query_x[None],
            query_y=episode.query_y[None],
        )
        return self._learner.predict(one)[0]


class Plain:
    """MAML as one writes it down with PyTorch alone."""

    def __init__(self, learner: MetaLearner, config: Config) -> None:
        self.model = learner.model
        self._inner, self._test_inner = config.inner, config.test_inner

    def meta_gradient(self, episode: Episode) -> Params:
        """Differentiate through all inner steps."""
        self.model.train()
        params = dict(self.model.named_parameters())
        fast: Params = dict(params)
        for _ in range(self._inner.num_steps):
            fast = self._step(fast, episode, self._inner, create_graph=True)
        loss = F.cross_entropy(functional_call(self.model, fast, episode.query_x), episode.query_y)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def predict(self, episode: Episode) -> Tensor:
        """Adapt, a fresh set of leaves a step."""
        self.model.eval()
        fast = leaves(dict(self.model.named_parameters()))
        for _ in range(self._test_inner.num_steps):
            fast = leaves(self._step(fast, episode, self._test_inner, create_graph=False))
        with torch.no_grad():
            logits: Tensor = functional_call(self.model, fast, episode.query_x)
        return logits

    def _step(
        self, fast: Params, episode: Episode, inner: InnerConfig, *, create_graph: bool
    ) -> Params:
        logits = functional_call(self.model, fast, episode.support_x)
        loss = F.cross_entropy(logits, episode.support_y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=create_graph)
        return {
            name: weight - learning_rate(name, inner) * grad
            for (name, weight), grad in zip(fast.items(), grads, strict=True)
        }


class Higher:
    """``higher.innerloop_ctx`` over ``torch.optim.SGD``."""

    def __init__(self, learner: MetaLearner, config: Config) -> None:
        self._higher = importlib.import_module("higher")
        self.model = learner.model
        self._num_steps = config.inner.num_steps, config.test_inner.num_steps
        self._sgd = self._optimizer(config.inner), self._optimizer(config.test_inner)

    def _optimizer(self, inner: InnerConfig) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": inner.lr},
            {"params": [], "lr": learning_rate(HEAD, inner)},
        ]
        for name, parameter in self.model.named_parameters():
            groups[name.startswith(HEAD)]["params"].append(parameter)
        return torch.optim.SGD(groups, momentum=inner.momentum, weight_decay=inner.weight_decay)

    def meta_gradient(self, episode: Episode) -> Params:
        """Differentiate through all inner steps."""
        params = dict(self.model.named_parameters())
        model = self._adapted(episode, training=True)
        loss = F.cross_entropy(model(episode.query_x), episode.query_y)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def predict(self, episode: Episode) -> Tensor:
        """Adapt in what higher calls test mode."""
        model = self._adapted(episode, training=False)
        with torch.no_grad():
            logits: Tensor = model(episode.query_x)
        return logits

    def _adapted(self, episode: Episode, *, training: bool) -> Any:
        self.model.train(training)
        with self._higher.innerloop_ctx(
            self.model,
            self._sgd[0 if training else 1],
            copy_initial_weights=False,
            track_higher_grads=training,
        ) as (model, sgd):
            for _ in range(self._num_steps[0 if training else 1]):
                sgd.step(F.cross_entropy(model(episode.support_x), episode.support_y))
            return model


class TorchOpt:
    """``torchopt.MetaSGD``; in evaluation ``torchopt.SGD``, which changes weights in place."""

    def __init__(self, learner: MetaLearner, config: Config) -> None:
        self._torchopt = importlib.import_module("torchopt")
        self.model = learner.model
        self._inner, self._test_inner = config.inner, config.test_inner

    def meta_gradient(self, episode: Episode) -> Params:
        """Differentiate through all inner steps."""
        self.model.train()
        params = dict(self.model.named_parameters())
        start = self._torchopt.extract_state_dict(self.model, by="reference")
        sgd = self._torchopt.MetaSGD(self.model, **_sgd_options(self._inner))
        for _ in range(self._inner.num_steps):
            sgd.step(F.cross_entropy(self.model(episode.support_x), episode.support_y))
        loss = F.cross_entropy(self.model(episode.query_x), episode.query_y)
        self._torchopt.recover_state_dict(self.model, start)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def predict(self, episode: Episode) -> Tensor:
        """Adapt the weights themselves, and put them back."""
        self.model.eval()
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        sgd = self._torchopt.SGD(self.model.parameters(), **_sgd_options(self._test_inner))
        for _ in range(self._test_inner.num_steps):
            sgd.zero_grad()
            F.cross_entropy(self.model(episode.support_x), episode.support_y).backward()
            sgd.step()
        with torch.no_grad():
            logits: Tensor = self.model(episode.query_x)
        self.model.load_state_dict(start)
        return logits


def _sgd_options(inner: InnerConfig) -> dict[str, float]:
    return {"lr": inner.lr, "momentum": inner.momentum, "weight_decay": inner.weight_decay}


OTHERS: dict[str, Callable[[MetaLearner, Config], Contender]] = {
    "plain": Plain,
    "higher": Higher,
    "torchopt": TorchOpt,
}
"""By the name of the library; ``plain`` is PyTorch alone."""
_CANNOT = {
    "plain": ("momentum", "weight_decay"),
    "higher": (),
    "torchopt": ("head_lr",),
}
"""Options of ``inner`` that the code above, or the library, does without."""


def build_contender(library: str, method: str, config: Config, device: torch.device) -> Contender:
    """Return a contender over the model of ``config`` with its initial weights.

    Args:
        library: ``raymaml``, or one of ``OTHERS``.
        method: one of ``EXACT_METHODS``; of others it is the plain graph whatever this is.
        config: what is measured.
        device: where the weights are.
    """
    inner = config.inner.model_copy(update={"gradient": method})
    config = config.model_copy(update={"inner": inner})
    ways = config.episodes.train.num_ways
    learner = build_learner(config, image_shape(config), ways, device)
    return OTHERS.get(library, Raymaml)(learner, config)


def missing(library: str) -> bool:
    """Tell whether a library is not installed."""
    return library not in {"raymaml", "plain"} and importlib.util.find_spec(library) is None


def what_it_lacks(library: str, config: Config, model: nn.Module) -> list[str]:
    """Name what a contender of ``OTHERS`` would need to compute the episode of ``config``."""
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
    return list(dict.fromkeys(lacks))
