"""The ways to compute one made-up episode: raymaml's methods, PyTorch, higher and TorchOpt."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from raymaml.config.data_sources import ImageFolderSource
from raymaml.config.explain import validated
from raymaml.config.inner import InnerConfig
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.layers import PassAware
from raymaml.meta.freezing import frozen_params
from raymaml.meta.rules import learning_rate
from raymaml.seeding import fold_in
from raymaml.storage.place import Place
from raymaml.training.state import build_learner
from raymaml.types import Episode, EpisodeBatch, Params, leaves, tensors_of

Phase = Literal["training", "evaluation"]
"""training: one meta-gradient; evaluation: adaptation without a graph, and the query pass."""
PHASES: tuple[Phase, ...] = ("training", "evaluation")
EXACT_METHODS = ("unrolled", "checkpointed", "mixed_mode")
"""The values of ``inner.gradient`` that compute one and the same number."""
STANDARD = {  # source, pixels, shots, channels of ConvNet4
    "convnet4-32-84x84-5way-1shot": ("mini-imagenet", 84, 1, 32),
    "convnet4-32-84x84-5way-5shot": ("mini-imagenet", 84, 5, 32),
    "convnet4-64-28x28-5way-1shot": ("omniglot", 28, 1, 64),
}
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


def _plain_at_once(
    model: nn.Module, episodes: EpisodeBatch, inner: InnerConfig, *, training: bool
) -> Params | Tensor:
    """MAML of several episodes by ``torch.func``: gradients [E, ...] by name, or logits."""

    def logits(params: Params, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        def loss(params: Params) -> Tensor:
            return F.cross_entropy(functional_call(model, params, support_x), support_y)

        for _ in range(inner.num_steps):
            grads = grad(loss)(params)
            params = {n: w - learning_rate(n, inner) * grads[n] for n, w in params.items()}
        found: Tensor = functional_call(model, params, query_x)
        return found

    def query_loss(params: Params, *sets: Tensor) -> Tensor:
        *others, query_y = sets
        return F.cross_entropy(logits(params, *others), query_y)

    params = {name: value.detach() for name, value in model.named_parameters()}
    sets = (episodes.support_x, episodes.support_y, episodes.query_x)
    compute, given = (
        (logits, sets) if not training else (grad(query_loss), (*sets, episodes.query_y))
    )
    result: Params | Tensor = vmap(compute, in_dims=(None, *[0] * len(given)))(params, *given)
    return result


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
_KNOWN = {
    "num_steps",
    "lr",
    "head_lr",
    "momentum",
    "weight_decay",
    "frozen",
    "gradient",
    "proximal",
}
"""Options of ``inner`` that do not turn the episode into another one, or that are judged apart."""


class Contender:
    """One way to compute the made-up episodes of ``config``; its model stays as it is.

    Args:
        library: ``raymaml``, or one of ``OTHERS``.
        method: One of ``EXACT_METHODS``; evaluation and libraries of ``OTHERS`` ignore it.
        config: The configuration that is measured.
        device: Device of weights and images.
        dtype: Type of weights and images.
        at_once: Number of copies of an episode that are computed together; ``raymaml`` and
            ``plain`` alone can do more than one.
    """

    def __init__(
        self,
        library: str,
        method: str,
        *,
        config: Config,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        at_once: int = 1,
    ) -> None:
        inner = config.inner.model_copy(update={"gradient": method, "proximal": None})
        precision = {} if dtype is torch.float32 else {"precision": "float32"}  # no autocast
        cluster = config.cluster.model_copy(update=precision)
        config = config.model_copy(update={"inner": inner, "cluster": cluster})
        shape, ways = _image_shape(config), config.episodes.train.num_ways
        self._learner = build_learner(config, shape, ways, device)
        self.model = self._learner.model.to(dtype)
        self._library, self._config, self._on_gpu = library, config, device.type == "cuda"
        self._batches = {
            phase: _copies_of(_episode(config, phase, device, dtype), at_once) for phase in PHASES
        }

    def compute(self, phase: Phase) -> Tensor:
        """Return the second-order meta-gradient, [P], or the logits of the queries, [N*Q * N].

        The gradient is that of the query loss in all parameters of the model. Of copies that are
        computed together, it is that of the first.
        """
        if not (self._on_gpu and torch.cuda.is_current_stream_capturing()):
            torch.manual_seed(0)  # for dropout
        batch, training = self._batches[phase], phase == "training"
        if self._library == "raymaml" and training:
            return self._flat(self._learner.chunk_gradients(batch)[0].grads)
        if self._library == "raymaml":
            return self._learner.predict(batch, at_once=len(batch))[0].reshape(-1)
        self.model.train(training)
        inner = self._config.inner if training else self._config.test_inner
        if len(batch) > 1:
            found = _plain_at_once(self.model, batch, inner, training=training)
            if isinstance(found, Tensor):
                return found[0].reshape(-1)
            return self._flat({name: value[0] for name, value in found.items()})
        episode, params = batch[0], dict(self.model.named_parameters())
        adapt = OTHERS[self._library](self.model, episode, inner, training=training)
        with adapt as adapted, torch.set_grad_enabled(training):
            logits = adapted(episode.query_x)
            if not training:
                return logits.reshape(-1)
            loss = F.cross_entropy(logits, episode.query_y)
            grads = torch.autograd.grad(loss, list(params.values()))
        return self._flat(dict(zip(params, grads, strict=True)))

    def _flat(self, grads: Params) -> Tensor:
        return torch.cat([grads[name].reshape(-1) for name, _ in self.model.named_parameters()])


def _copies_of(episode: Episode, count: int) -> EpisodeBatch:
    """Return an episode ``count`` times."""
    copies: dict[str, Any] = {
        name: torch.stack([value] * count) for name, value in tensors_of(episode).items()
    }
    return EpisodeBatch(**copies, num_ways=episode.num_ways)


def _image_shape(config: Config) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of the source of ``config``."""
    source, size = config.data.source, config.data.image_size
    folder_of_gray = isinstance(source, ImageFolderSource) and source.mode == "gray"
    gray = folder_of_gray or source.kind in {"glyphs", "omniglot"}
    return (1 if gray else 3), size, size


def _episode(config: Config, phase: Phase, device: torch.device, dtype: torch.dtype) -> Episode:
    """Draw an episode of normal noise; ``config`` decides it up to rounding."""
    spec = config.episodes.of("train" if phase == "training" else "test")
    generator = torch.Generator().manual_seed(fold_in(config.seed, "bench", phase))
    tensors: dict[str, Any] = {}
    for name, per_class in (("support", spec.num_shots), ("query", spec.num_queries)):
        shape = (spec.num_ways * per_class, *_image_shape(config))
        tensors[f"{name}_x"] = torch.randn(shape, generator=generator).to(device, dtype)
        labels = torch.arange(spec.num_ways, device=device)
        tensors[f"{name}_y"] = labels.repeat_interleave(per_class)
    return Episode(**tensors, num_ways=spec.num_ways)


def why_not(library: str, config: Config, model: nn.Module) -> str | None:
    """Return why a library of ``OTHERS`` cannot compute an episode of ``config``, or None."""
    if library != "plain" and importlib.util.find_spec(library) is None:
        return "not installed (pip install raymaml[bench])"
    lacks = []
    layers = [layer for layer in model.modules() if isinstance(layer, PassAware)]
    by_step = any(norm.per_step != "none" for norm in config.model.norm_by_pattern.values())
    if by_step or any(layer.accumulates or layer.reads_context for layer in layers):
        lacks.append(f"model.norm {config.model.norm_text}")
    if config.model.head != "learned":
        lacks.append(f"model.head {config.model.head}")
    for inner in (config.inner, config.test_inner):
        if frozen_params("inner.frozen", model, inner.frozen):
            lacks.append("parameters that do not adapt")
        lacks += [f"inner.{option}" for option in _CANNOT[library] if getattr(inner, option)]
        lacks += [f"inner.{option}" for option in inner.changed if option not in _KNOWN]
    return f"does without {', '.join(dict.fromkeys(lacks))}" if lacks else None


def configs_to_measure(path: Place | None, overrides: Sequence[str]) -> list[Config]:
    """Return the user's configuration, or the standard ones if ``path`` is None.

    Raises:
        UserError: The configuration has mistakes.
    """
    if path is not None:
        return [load_config(path, overrides)]
    return [standard(name, *facts) for name, facts in STANDARD.items()]


def standard(name: str, source: str, size: int, shots: int, width: int) -> Config:
    """ConvNet4, 5 ways, 15 queries a class, 5 inner steps; no image is read from the source."""
    split = {"num_ways": 5, "num_shots": shots, "num_queries": 15, "num_episodes": 1}
    tree = {
        "name": name,
        "data": {
            "source": {"kind": source, "path": "unused"},
            "bank": "unused",
            "shards": "unused",
            "image_size": size,
        },
        "episodes": {"train": split, "val": split, "test": split},
        "model": {"encoder": "convnet4", "width": width},
        "inner": {"num_steps": 5, "lr": 0.01},
        "outer": {"num_steps": 1},
    }
    return validated(Config, tree, name)
