"""What an episode asks of a GPU, counted without computing it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from raymaml.bench.cases import image_shape, made_up_episode
from raymaml.bench.probes import AtenCalls
from raymaml.config.schema import Config
from raymaml.episode_checks import unchecked
from raymaml.training.settings import gradient_method
from raymaml.training.state import build_learner
from raymaml.types import Episode

GPU = torch.device("cuda")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one meta-gradient, as a GPU would compute it."""

    method: str
    flops: int
    """Of convolutions and products, 2 for a multiplication with its addition."""
    calls: int
    """Operators that PyTorch is asked for, one after the other."""
    num_params: int
    """P."""
    outcome_width: int
    """Floats of an episode beside its gradient."""


def count(config: Config) -> Counts:
    """Count one episode of ``config`` on tensors that have shapes only.

    Its gradient is by the method that ``auto`` takes on a GPU; an ``inner.gradient`` of the config
    stays, but for mixed_mode, which looks at numbers: its calls are those of checkpointed.
    """
    shape = image_shape(config)
    method = gradient_method(config, shape, GPU)
    method = "checkpointed" if method == "mixed_mode" else method
    inner = config.inner.model_copy(update={"gradient": method})
    cluster = config.cluster.model_copy(update={"precision": "float32"})
    config = config.model_copy(update={"inner": inner, "cluster": cluster})
    learner = build_learner(config, shape, config.episodes.train.num_ways, CPU)
    num_params = sum(value.numel() for value in learner.params.values())
    width = 3 + sum(value.numel() for value in learner.running_moments.values())
    episode = made_up_episode(config, "training", CPU, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _without_values(learner.model, fake)
        shapes = {
            field.name: fake.from_tensor(getattr(episode, field.name)) for field in fields(Episode)
        }
        with FlopCounterMode(display=False) as flops, AtenCalls() as calls:
            learner.episode_gradient(unchecked(Episode, shapes))
    return Counts(
        method=method,
        flops=flops.get_total_flops(),
        calls=calls.count,
        num_params=num_params,
        outcome_width=width,
    )


def _without_values(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace all parameters and buffers by tensors of the same shape without memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = fake.from_tensor(parameter.detach())
            setattr(module, name, nn.Parameter(value, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake.from_tensor(buffer))
