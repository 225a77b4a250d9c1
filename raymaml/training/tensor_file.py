"""Tensors from files that are not believed: checkpoints of ours and of others."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from raymaml.common.errors import reason_of
from raymaml.types import Params


def read_tensors(content: bytes, device: torch.device) -> Any:
    """Return what ``torch.save`` wrote: tensors, containers, text and numbers, and nothing else.

    Raises:
        ValueError: the content is damaged, is packed (which ``torch.save`` does not do, and which
            could fill the memory), or asks for more than tensors.
    """
    try:
        if zipfile.is_zipfile(source := io.BytesIO(content)):
            packed = sum(each.file_size for each in zipfile.ZipFile(source).infolist())
            if packed > len(content):
                raise ValueError("its parts are packed")
        source.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old protocols and types, of no use to a user
            return torch.load(source, map_location=device, weights_only=True)
    except UnpicklingError:
        raise ValueError("it holds more than tensors, which is not loaded") from None
    except Exception as error:  # torch's reader has no list of what it raises on damage
        raise ValueError(f"torch cannot read it: {reason_of(error)[:200]}") from None


def weights_bytes(weights: Params) -> bytes:
    """Return the content of a safetensors file. Each tensor is copied: the format knows neither
    shared memory nor strides."""
    apart = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    return safetensors.torch.save(apart)


def read_weights(content: bytes, device: torch.device) -> Params:
    """Return the tensors of a safetensors file by name.

    Raises:
        ValueError: the content is damaged.
    """
    try:
        found = safetensors.torch.load(content)
    except Exception as error:  # some damage is an assertion or a missing key of the library
        raise ValueError(f"safetensors cannot read it: {reason_of(error)[:200]}") from None
    # in an order that is always the same, which that of the library is not
    return {name: found[name].to(device) for name in sorted(found)}


def can_be_kept(value: Tensor) -> bool:
    """Whether a safetensors file can hold such a tensor."""
    try:
        weights_bytes({"": value[:0] if value.ndim else value})
    except Exception:  # a type that it does not know, or a tensor without memory of its own
        return False
    return True


def is_plain(value: object) -> bool:
    """Whether a value is an ordinary tensor: dense, with memory of its own."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and not value.is_nested
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over what an optimizer has accumulated; rates and the like are those of the config.

    Raises:
        ValueError: it is not of these parameters and this rule; nothing is changed then.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = saved.get("state")
    if not isinstance(state, dict) or state.keys() not in (set(), set(range(len(params)))):
        raise ValueError("it does not hold the state of each parameter")
    wanted = _fresh_state(optimizer, params) if state else []
    for number, template in enumerate(wanted):
        own = state[number]
        if not isinstance(own, dict) or own.keys() != template.keys():
            raise ValueError(f"of parameter {number} it holds no {', '.join(template)}")
        for name, like in template.items():
            found = own[name]
            if not is_plain(found) or (found.shape, found.dtype) != (like.shape, like.dtype):
                raise ValueError(f"{name} of parameter {number} has another shape or type")
    # Copies have memory of their own: what is stored may be one number that is shown many times.
    copies = {
        number: {name: value.clone() for name, value in own.items()}
        for number, own in state.items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": copies, "param_groups": groups})


def _fresh_state(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return what such an optimizer holds of each parameter after a step, from zeros."""
    stand_ins = [torch.zeros_like(param) for param in params]
    for stand_in in stand_ins:
        stand_in.grad = torch.zeros_like(stand_in)
    same: Any = type(optimizer)
    other = same(stand_ins, **optimizer.defaults)
    other.step()
    return [dict(other.state[stand_in]) for stand_in in stand_ins]
