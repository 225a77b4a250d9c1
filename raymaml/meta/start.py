"""Where an episode starts, and the way back from there to the parameters."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig
from raymaml.layers import tracking_norms
from raymaml.meta.chunks import repeated
from raymaml.meta.inner_loop import Fast
from raymaml.meta.rules import HEAD
from raymaml.meta.stand_ins import out_of_reach
from raymaml.types import Episode, EpisodeBatch, Params

Head = Literal["learned", "zero", "shared"]
"""``model.head``: where the head starts in each episode."""


def begin(
    model: nn.Module,
    head: Head,
    episode: Episode | EpisodeBatch,
    frozen: Set[str],
    inner: InnerConfig,
) -> tuple[Params, Fast]:
    """Return the parameters that stay, and those that adapt, at rest; a copy for each episode.

    Raises:
        UserError: gradients cannot be computed here, or the head does not fit the labels.
    """
    _require_gradients(episode)
    _require_rows(model, head, episode)
    params = {
        name: _head_start(head, value, episode) if name.startswith(HEAD) else value
        for name, value in model.named_parameters()
    }
    # cloned: a layer of somebody else's may change its buffers in place
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if isinstance(episode, EpisodeBatch):
        params, buffers = repeated(params, len(episode)), repeated(buffers, len(episode))
    adapting = {name: value for name, value in params.items() if name not in frozen}
    fixed = {name: value.detach() for name, value in params.items() if name in frozen}
    return fixed, Fast.at(adapting, buffers, inner)


def _require_gradients(episode: Episode | EpisodeBatch) -> None:
    if torch.is_inference_mode_enabled():
        raise UserError(
            "torch.inference_mode: an episode is adapted by gradients, which do not exist in it",
            remedy="call outside of it, or use torch.no_grad()",
        )
    for name, value in vars(episode).items():
        if value.is_inference():
            raise UserError(
                f"{name}: was made in torch.inference_mode, and PyTorch keeps such a tensor out of"
                " gradients",
                remedy=f"make it outside, or give {name}.clone()",
            )


def _require_rows(model: nn.Module, head: Head, episode: Episode | EpisodeBatch) -> None:
    labels = episode.support_y
    # Only where it costs nothing: a GPU would be waited for in each step of training.
    if head != "learned" or labels.device.type != "cpu" or isinstance(labels, FakeTensor):
        return
    rows, ways = len(model.get_parameter(f"{HEAD}weight")), int(labels.max()) + 1
    if ways != rows:
        raise UserError(
            f"head: has {rows} rows and the episode {ways} classes",
            remedy=f"build the model with num_ways={ways}, or give a head that starts at zero or"
            " is shared",
        )


def _head_start(head: Head, value: Tensor, episode: Episode | EpisodeBatch) -> Tensor:
    """Where a parameter of the head, [rows, ...], starts in the episode."""
    if head == "learned":
        return value
    shape = (int(episode.support_y.max()) + 1, *value.shape[1:])  # N rows
    return (
        value.new_zeros(shape)
        if head == "zero"
        else value.repeat(shape[0], *([1] * (value.ndim - 1)))
    )


def of_parameter(head: Head, name: str, grad: Tensor) -> Tensor:
    """Take the gradient in where an episode starts to that in the parameter ``name``."""
    if head == "shared" and name.startswith(HEAD):
        rows = -2 if name.endswith("weight") else -1  # of [E, N, features] or [E, N]
        return grad.sum(rows, keepdim=True)
    return grad


def require_fitting(model: nn.Module, head: Head) -> None:
    """Check that episodes can start at the model.

    Raises:
        UserError: parameters have no shape yet, a part is TorchScript, a norm keeps moments from
            episode to episode, a tensor was made in inference mode or lies where no pass reaches
            it, the head's parameters are elsewhere in the model too, there is no
            head, or a shared head has not one row.
    """
    _require_tensors(model)
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(
            f"model: {', '.join(scripted)} is TorchScript, which takes no weights but its own, so"
            " that it would neither adapt nor learn",
            remedy="give the nn.Module that it was made of",
        )
    if names := tracking_norms(model):
        raise UserError(
            f"model: {', '.join(names)} keep moments from episode to episode",
            remedy="raymaml.apply_policies gives them a norm policy",
        )
    if hidden := out_of_reach(model):
        raise UserError(
            f"model: {', '.join(hidden)} hold modules, parameters or buffers in an object, where"
            " they would neither adapt nor learn",
            remedy="hold modules as submodules, and tensors in modules",
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    held = [model.get_parameter(name) for name in names if name.startswith(HEAD)]
    elsewhere = [
        name
        for name in names
        if not name.startswith(HEAD) and any(model.get_parameter(name) is p for p in held)
    ]
    if elsewhere:
        raise UserError(
            f"head: its parameters are {', '.join(elsewhere)} too, so that it cannot start or"
            " learn apart from the encoder",
            remedy="give the model a head that is nowhere else in it",
        )
    if f"{HEAD}weight" not in dict(model.named_parameters()):
        linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        found = f"its linear layers are {', '.join(linear)}" if linear else "it has no linear layer"
        raise UserError(
            f"model: has no linear layer named head ({found})",
            remedy="name the classifier so, as in self.head = nn.Linear(features, num_ways)",
        )
    rows = len(model.get_parameter(f"{HEAD}weight"))
    if (head == "shared") != (rows == 1):
        raise UserError(
            f"head: is {head}, and head.weight has {rows} row(s)", remedy="a shared head has one"
        )


def _require_tensors(model: nn.Module) -> None:
    """Check that parameters have shapes, and that all can take part in gradients."""
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise UserError(
            f"model: {', '.join(lazy)} have no shape before the first pass",
            remedy="call the model once on images",
        )
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if made := [name for name, value in own.items() if value.is_inference()]:
        raise UserError(
            f"model: {', '.join(made)} were made in torch.inference_mode, and PyTorch keeps such"
            " tensors out of gradients",
            remedy="build the model outside of it",
        )
