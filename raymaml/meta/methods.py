"""The methods of ``inner.gradient`` by name."""

from __future__ import annotations

from raymaml.meta.checkpointing import checkpointed
from raymaml.meta.gradients import Method, first_order, unrolled
from raymaml.meta.mixed_mode import mixed_mode

METHODS: dict[str, Method] = {
    "auto": checkpointed,  # right for any module; who knows the model and the images knows better
    "unrolled": unrolled,
    "checkpointed": checkpointed,
    "mixed_mode": mixed_mode,
    "first_order": first_order,
}
SINGLE_BACKWARD = {"mixed_mode", "first_order"}
"""Methods that differentiate each pass backward once, at most, and maybe forward over that."""
