"""The passes of an episode through a model, and the layers that tell them apart."""

from __future__ import annotations

from typing import Literal

from torch import nn

TRACKING = nn.modules.batchnorm._NormBase
"""The base of PyTorch's batch and instance norms, and of norms that others derive from them: they
may keep moments, which would leak from episode to episode."""


def tracking_norms(model: nn.Module) -> list[str]:
    """Name the layers that keep moments and do not tell the passes of an episode apart."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, TRACKING) and module.track_running_stats
    ]


Pass = Literal["support", "context", "query"]
"""What a forward pass of an episode is for: ``support`` to adapt on the support set; ``context``
to look at the support set once more, with the adapted weights; ``query`` to be judged."""


Rules = Literal["torch", "composed", "closed"]
"""Whose derivatives a pass needs: ``torch`` PyTorch's kernels, which can be differentiated backward
again; ``composed`` functions of PyTorch that can be differentiated forward over backward and
vectorised; ``closed`` rules of raymaml, for one backward pass, and forward over that for the sake
of the derivatives along the direction alone."""


class OwnRules(nn.Module):
    """A layer with derivatives of its own; whoever runs a pass says which it needs."""

    rules: Rules = "torch"


class PassAware(OwnRules):
    """A layer that tells the passes of an episode apart; whoever runs a pass says which it is.

    ``training`` keeps PyTorch's meaning: meta-training, or evaluation.
    """

    current_pass: Pass = "support"
    accumulates: bool = False
    """The layer's buffers change in the support passes and are read in the query pass."""
    reads_context: bool = False
    """The query pass reads what a context pass has written into the layer's buffers."""
    outlives_episodes: bool = False
    """The moments go on from one meta-batch to the next; otherwise each episode starts anew."""
