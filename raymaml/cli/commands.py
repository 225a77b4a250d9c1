"""The commands of ``raymaml``: each parses its arguments and calls the package."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import raymaml
from raymaml.cli.data import data
from raymaml.cli.demo import demo
from raymaml.cli.options import (
    LOCAL,
    OPTIONAL_CONFIG,
    OVERRIDES,
    Commands,
    UserPath,
    load,
    reports_user_errors,
    require_kept,
    say,
    say_line,
    takes_config,
    takes_plan,
)
from raymaml.cli.predict import predict
from raymaml.common.stopping import INTERRUPTED, stop_code
from raymaml.config.schema import Config
from raymaml.config.starters import STARTERS, write_starter
from raymaml.storage.place import Place

if TYPE_CHECKING:
    from raymaml.library import ReportResult


@click.group(cls=Commands)
@click.version_option(raymaml.__version__)
def main() -> None:
    """Train and judge MAML for few-shot image classification.

    Every command takes a YAML config and key.path=value overrides.
    """


main.add_command(data)
main.add_command(demo)
main.add_command(predict)


@main.command()
@click.argument("name", type=click.Choice([*STARTERS]), default="images")
@reports_user_errors
def init(name: str) -> None:
    """Write a starter config for NAME, by default your own images, into the current folder."""
    path = write_starter(name, Path())
    say(f"{path}: read it, then run")
    for command in ("data import", "data sample", "train", "test"):
        say(f"  raymaml {command} {path}")


@main.command()
@takes_config
@LOCAL
def train(config: Config, local: bool) -> None:
    """Train the run that CONFIG names, or resume it."""
    from raymaml import library

    if not library.train(config, local=local, echo=say).done:
        sys.exit(stop_code())


@main.command()
@takes_config
@LOCAL
def pretrain(config: Config, local: bool) -> None:
    """Train the encoder of CONFIG as a classifier over all training classes, or resume it.

    The section `pretrain` says how; the run is `<name>-pretrain`.
    """
    from raymaml.library import trainer

    if not trainer(local=local)(config.pretraining, say):
        sys.exit(stop_code())


@main.command()
@takes_config
@LOCAL
@click.option("--replay", is_flag=True, help="Judge all records again, here, and compare them.")
def test(config: Config, local: bool, replay: bool) -> None:
    """Judge the run that CONFIG names on its test episodes, and write the report."""
    from raymaml import library

    if replay:
        from raymaml.evaluation.campaign import replay_locally
        from raymaml.evaluation.run_test import plan_test

        count = replay_locally(partial(plan_test, config), config.cluster, say)
        say(f"{config.run_folder}: all {count} records repeated")
        return
    _show_report(library.test(config, local=local, echo=say))


@main.command()
@takes_config
def report(config: Config) -> None:
    """Write the report of a finished campaign again."""
    from raymaml import library

    _show_report(library.report(config))


@main.command()
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


@main.command()
@takes_plan("STUDY")
def study(plan_path: Place, overrides: tuple[str, ...], config: Place | None, local: bool) -> None:
    """Train the models of STUDY, judge its arms on the same episodes, and write the report.

    The overrides change the config of all its models and arms. Finished parts are not repeated, so
    that arms and episodes can be added later.
    """
    from raymaml.experiments.study import run_study
    from raymaml.experiments.study_file import read_study
    from raymaml.library import judge_of, trainer

    found = read_study(plan_path, overrides, config)
    require_kept(found.base)
    path = run_study(found, train=trainer(local=local), judge=judge_of(local=local), echo=say)
    if path is None:
        sys.exit(stop_code())
    say(path)


@main.command()
@takes_plan("SWEEP")
def sweep(plan_path: Place, overrides: tuple[str, ...], config: Place | None, local: bool) -> None:
    """Train the trials that SWEEP draws, end the bad ones early, and export the best.

    The overrides change the config of all trials. Run again, it goes on from where it was.
    """
    from raymaml.cluster.search import decisions, proposals
    from raymaml.experiments.sweep import read_sweep, run_sweep

    if local:
        from raymaml.experiments.sweep import run_in_order as runner
    else:
        from raymaml.cluster.sweep import run_on_tune as runner
    found = read_sweep(plan_path, overrides, config)
    require_kept(found.base)
    propose = proposals(found.settings)
    say(run_sweep(found, runner=runner, decide=decisions(found), propose=propose, echo=say))


def _show_report(result: ReportResult) -> None:
    """Print the number and the page, last the path of ``summary.json``."""
    say(result.headline)
    say(result.path)


@main.command()
@click.argument("configs", metavar="[REFERENCE_YAML]...", nargs=-1, type=UserPath())
@click.option("--checkpoint", type=UserPath(), help="A .pth of the reference.")
@click.option("--out", type=UserPath(), required=True, help="The YAML to write.")
@click.option("--name", help="Name of the run.")
@reports_user_errors
def convert(
    configs: tuple[Path, ...], checkpoint: Path | None, out: Path, name: str | None
) -> None:
    """Convert configurations and a checkpoint of fmu2/PyTorch-MAML.

    Give its training YAML, its test YAML, or both; a checkpoint can stand for the training YAML.
    """
    from raymaml.convert.command import convert_files

    convert_files(configs, checkpoint, out, name, say)


@main.command()
@OPTIONAL_CONFIG
@OVERRIDES
@LOCAL
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_user_errors
def doctor(
    config_path: Place | None, overrides: tuple[str, ...], local: bool, as_json: bool
) -> None:
    """Check versions, this machine, the cluster and the places of CONFIG, and print the remedies.

    Ends with a short training from images to a report, on made-up images. Exit code 1 if anything
    fails.
    """
    from raymaml.doctor.command import examine, show

    config = None if config_path is None else load(config_path, overrides)
    if not show(examine(config, local=local), as_json=as_json):
        sys.exit(1)


@main.command(context_settings={"show_default": True})
@OPTIONAL_CONFIG
@OVERRIDES
@click.option("--methods", metavar="NAMES", help="Of unrolled,checkpointed,mixed_mode,plain,...")
@click.option("--steps", default="1,5,10,20,50", help="Inner steps of the plot; empty for none.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Rounds.")
@click.option("--episodes", default=2, type=click.IntRange(min=1), help="A process, in a round.")
@click.option("--at-once", metavar="NUMBERS", help="Episodes at once; default 1, on GPUs 1,16,64.")
@click.option("--json", "json_path", type=UserPath(dir_okay=False))
@click.option("--plot", "plot_path", type=UserPath(dir_okay=False), default="bench.png")
@reports_user_errors
def bench(
    *,
    config_path: Place | None,
    overrides: tuple[str, ...],
    methods: str | None,
    steps: str,
    repeats: int,
    episodes: int,
    at_once: str | None,
    json_path: Path | None,
    plot_path: Path,
) -> None:
    """Time the gradient methods and other libraries on CONFIG, or on standard ones.

    Images are made up: no data set is needed. pip install raymaml[bench] brings the other
    libraries. The table shows how far their gradients differ.
    """
    from raymaml.bench.contenders import configs_to_measure
    from raymaml.bench.measure import effort, measure
    from raymaml.bench.report import draw, table, write_json

    how = effort(methods, steps, repeats, episodes, at_once)
    rows = []
    try:
        for config in configs_to_measure(config_path, overrides):
            measured = measure(config, how, say)
            rows += measured
            say(f"\n{table(measured)}\n")
            if json_path is not None:
                write_json(json_path, rows)
            if how.steps:
                draw(plot_path, rows)
    except KeyboardInterrupt:
        say_line("raymaml: interrupted; configurations that are finished are written", err=True)
        sys.exit(INTERRUPTED)
    if json_path is not None:
        say(str(json_path))
    if how.steps:
        say(str(plot_path))
