"""``raymaml train``, ``test``, ``report``, ``audit``, ``study``, ``sweep``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from raymaml.cli.options import LOCAL, require_kept, say, takes_config, takes_plan
from raymaml.common.stopping import stop_code
from raymaml.config.schema import Config
from raymaml.storage.place import Place

if TYPE_CHECKING:
    from raymaml.evaluation.campaign import Campaign


@click.command()
@takes_config
@LOCAL
def train(config: Config, local: bool) -> None:
    """Train the run that CONFIG names, or resume it."""
    if not _train(local)(config, say):
        sys.exit(stop_code())


@click.command()
@takes_config
@LOCAL
@click.option("--replay", is_flag=True, help="Judge all records again, here, and compare them.")
def test(config: Config, local: bool, replay: bool) -> None:
    """Judge the run that CONFIG names on its test episodes, and write the report."""
    from raymaml.evaluation.run_test import plan_test

    if replay:
        from raymaml.evaluation.replay import replay_locally

        count = replay_locally(partial(plan_test, config), config.cluster, say)
        say(f"{config.run_folder}: all {count} records repeated")
        return
    _show_report(_judge(local)(partial(plan_test, config), config.cluster, say))


@click.command()
@takes_config
def report(config: Config) -> None:
    """Write the report of a finished campaign again."""
    from raymaml.evaluation.run_test import plan_report

    _show_report(plan_report(config))


@click.command()
@takes_config
@LOCAL
def audit(config: Config, local: bool) -> None:
    """Judge with other queries, labels and support sets, which the accuracy hides.

    The next report of the run (`raymaml test` or `raymaml report`) shows the results. Audits always
    run in this process, without Ray.
    """
    del local  # scripts give the option to all commands alike
    from raymaml.evaluation.run_audit import audit_run

    say(audit_run(config, say))


@click.command()
@takes_plan("STUDY")
def study(plan_path: Place, overrides: tuple[str, ...], config: Place | None, local: bool) -> None:
    """Train the models of STUDY, judge its arms on the same episodes, and write the report.

    The overrides change the config of all its models and arms. Finished parts are not repeated, so
    that arms and episodes can be added later.
    """
    from raymaml.experiments.study import run_study
    from raymaml.experiments.study_file import read_study

    found = read_study(plan_path, overrides, config)
    require_kept(found.base)
    path = run_study(found, train=_train(local), judge=_judge(local), echo=say)
    if path is None:
        sys.exit(stop_code())
    say(path)


@click.command()
@takes_plan("SWEEP")
def sweep(plan_path: Place, overrides: tuple[str, ...], config: Place | None, local: bool) -> None:
    """Train the trials that SWEEP draws, end the bad ones early, and export the best.

    The overrides change the config of all trials. Run again, it goes on from where it was.
    """
    from raymaml.cluster.search import decisions, proposals
    from raymaml.experiments.sweep import read_sweep, run_sweep

    if local:
        from raymaml.experiments.local_trials import run_in_order as runner
    else:
        from raymaml.cluster.sweep import run_on_tune as runner
    found = read_sweep(plan_path, overrides, config)
    require_kept(found.base)
    propose = proposals(found.settings)
    say(run_sweep(found, runner=runner, decide=decisions(found), propose=propose, echo=say))


def _show_report(campaign: Campaign) -> None:
    """Write the report; print its number and its page, last the path of ``summary.json``."""
    from raymaml.report.write import headline_of, write_test_report

    path = write_test_report(campaign)
    say(headline_of(path))
    say(path)


def _train(local: bool) -> Callable[..., bool]:
    if local:
        from raymaml.training.worker import train_locally as run
    else:
        from raymaml.cluster.train import train_on_cluster as run
    return run


def _judge(local: bool) -> Callable[..., Campaign]:
    if local:
        from raymaml.evaluation.campaign import judge_locally as run
    else:
        from raymaml.cluster.campaign import judge_on_cluster as run
    return run
