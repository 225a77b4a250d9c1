"""Random numbers of passes: where torch's generators stand, and drawing from there once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raymaml.types import Fast

Generators = tuple[Tensor, dict[torch.device, Tensor]]
"""States of torch's generators: of the CPU, and of the GPUs that hold weights."""


def generators(fast: Fast) -> Generators:
    """Return the states of torch's generators now, on all devices of the weights."""
    devices = {value.device for value in fast.params.values() if value.is_cuda}
    if devices and torch.cuda.is_current_stream_capturing():  # nothing draws in a CUDA graph
        devices = set()
    return torch.get_rng_state(), {each: torch.cuda.get_rng_state(each) for each in devices}


@contextmanager
def drawing_as(states: Generators | None) -> Iterator[None]:
    """Draw random numbers from these states in the block, and go on from the present ones after it;
    None: draw as ever."""
    if states is None:
        yield
        return
    cpu, others = states
    with torch.random.fork_rng(devices=list(others)):
        torch.set_rng_state(cpu)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)
        yield
