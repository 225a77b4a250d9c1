"""Ray Tune's ASHA as a function of the reports, apart from any run of Tune."""

from __future__ import annotations

from types import SimpleNamespace

from ray.tune.schedulers import ASHAScheduler
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from raymaml.evaluation.referee import Decide


def asha_decisions(*, first_rung: int, reduction_factor: int, max_steps: int) -> Decide:
    """Return decisions by Tune's ``ASHAScheduler``, which has seen no report yet.

    It decides by the accuracies that came before, in the order in which they came; asked again
    about the same reports in the same order, it comes to the same decisions.
    """
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="accuracy",
        mode="max",
        max_t=max_steps,
        grace_period=first_rung,
        reduction_factor=reduction_factor,
    )
    known: dict[int, SimpleNamespace] = {}

    def decide(trial: int, step: int, accuracy: float) -> bool:
        if trial not in known:
            known[trial] = SimpleNamespace(trial_id=str(trial))  # all that it looks at
            scheduler.on_trial_add(None, known[trial])
        result = {"step": step, "accuracy": accuracy}
        decision = scheduler.on_trial_result(None, known[trial], result)
        return bool(decision == TrialScheduler.CONTINUE)

    return decide
