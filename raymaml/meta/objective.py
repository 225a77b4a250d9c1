"""The objective of the outer loop: how the query losses after each inner step weigh."""

from __future__ import annotations

from raymaml.config.inner import InnerConfig, MultiStepLoss


def query_weights(inner: InnerConfig, outer_step: int | None) -> tuple[float, ...]:
    """Return the weights of the query losses after 0..T inner steps in an outer step.

    The loss after the last step is all, unless the multi-step loss applies there; None stands for
    an outer step after its end.
    """
    several = inner.multi_step_loss
    last = (*[0.0] * inner.num_steps, 1.0)
    if several is None or outer_step is None or outer_step >= several.num_outer_steps:
        return last
    stage = outer_step * several.num_stages // several.num_outer_steps
    return (0.0, *importance(inner.num_steps, stage, several)) if inner.num_steps else last


def importance(num_steps: int, stage: int, several: MultiStepLoss) -> list[float]:
    """Return the importance of the losses after steps 1..T in a stage, which add up to 1.

    MAML++ (Antoniou et al. 2019), as its code anneals them: each starts at 1/T, those before the
    last fall by 1/T/stages in each stage, to 0.03/T at least, and the last gains what they lose.
    """
    share = 1 / num_steps
    fallen = stage * share / several.num_stages
    early = [max(share - fallen, 0.03 * share)] * (num_steps - 1)
    last = min(share + (num_steps - 1) * fallen, 1 - (num_steps - 1) * 0.03 * share)
    return [*early, last]
