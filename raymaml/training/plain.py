"""Plain learning: the gradient of a classifier on labelled images, without adaptation."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.learner import MetaLearner
from raymaml.passes.calls import alone
from raymaml.passes.derivatives import differentiated
from raymaml.passes.forward import Passes
from raymaml.passes.moments import running_moments
from raymaml.types import EpisodeBatch, leaves


@alone()
@torch.enable_grad()
def plain_gradients(
    learner: MetaLearner, batch: EpisodeBatch, _step: int = 0
) -> list[EpisodeGradient]:
    """Return mean cross-entropy, logits and gradient in theta of each set of query images.

    The images pass as a support set does: each norm takes the moments of the set.
    """
    model = learner.model
    passes = Passes(model, half_precision=learner.half_precision, rules="closed")
    buffers, results = dict(model.named_buffers()), []
    for episode in batch:
        laid = episode.channels_last() if learner.channels_last else episode
        params = leaves(learner.params)
        logits, after = passes.support_logits(params, buffers, laid.query_x)
        loss = F.cross_entropy(logits, laid.query_y)
        results.append(
            EpisodeGradient(
                loss=loss.detach(),
                logits=logits.detach(),
                grads=differentiated(loss, params),
                buffers=running_moments(model, after),
            )
        )
    return results
