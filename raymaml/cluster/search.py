"""Ray Tune's scheduler and searcher as functions of a journal, apart from any run of Tune."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

from raymaml.common.errors import UserError
from raymaml.config.sweep import Asha, Dimension, SweepConfig
from raymaml.experiments.journal import Decide, Journal
from raymaml.experiments.sweep import Propose, Sweep, draw_values
from raymaml.seeding import fold_in


def decisions(sweep: Sweep) -> Decide:
    """Return the decisions of the sweep's scheduler, which has seen no report yet."""
    asha, rung = sweep.settings.scheduler, sweep.first_rung
    if not isinstance(asha, Asha) or rung is None:
        return lambda _trial, _step, _accuracy: True
    return asha_decisions(rung, asha.reduction_factor, sweep.max_steps)


def asha_decisions(first_rung: int, reduction_factor: int, max_steps: int) -> Decide:
    """Return decisions by Tune's ``ASHAScheduler``.

    It decides by the accuracies that came before, in the order in which they came; the same reports
    in the same order lead to the same decisions.
    """
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

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


def proposals(settings: SweepConfig) -> Propose:
    """Return the search of a sweep.

    By Optuna, the values of a trial are a function of seed, trial, and the best accuracies of the
    trials before it: each suggestion comes from a new ``OptunaSearch`` of Tune, so that a kill
    changes nothing.

    Raises:
        UserError: it needs Optuna, which is not installed.
    """
    if settings.search == "random":
        return lambda trial, _journal: draw_values(settings, trial)
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "search is optuna, which is not installed; run `pip install 'raymaml[optuna]'`, or use"
            " search: random"
        )
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces each searcher
    lists = {key: each.values for key, each in settings.space.items() if each.bounds is None}

    def propose(trial: int, journal: Journal) -> dict[str, Any]:
        space = {key: _domain(dimension) for key, dimension in settings.space.items()}
        searcher = OptunaSearch(seed=fold_in(settings.seed, "sweep", "optuna", trial) % 2**32)
        searcher.set_search_properties("accuracy", "max", space)
        for known, values in sorted(journal.values.items()):
            if (best := journal.best(known)) is not None:
                point = {k: lists[k].index(v) if k in lists else v for k, v in values.items()}
                searcher.add_evaluated_point(point, best.accuracy)
        point = searcher.suggest(str(trial))
        return {key: lists[key][at] if key in lists else at for key, at in point.items()}

    return propose


def _domain(dimension: Dimension) -> Any:
    """Return a dimension as Tune has it; of a list the places, since Optuna takes plain values."""
    from ray import tune

    if dimension.integer is not None:
        return tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    if dimension.bounds is None:
        return tune.choice(range(len(dimension.values)))
    draw = tune.uniform if dimension.log_uniform is None else tune.loguniform
    return draw(*dimension.bounds)
