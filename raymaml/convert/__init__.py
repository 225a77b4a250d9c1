"""Moving over from fmu2/PyTorch-MAML ("the reference"): its configurations and checkpoints."""

from raymaml.convert.learner import from_reference
from raymaml.convert.reference import reference_names

__all__ = ["from_reference", "reference_names"]
