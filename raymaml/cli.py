"""``raymaml data import|sample|show``, ``train``, ``test``, ``report``, ``audit``,
``study``, ``sweep``, ``convert``, ``bench``, ``scale``, ``doctor``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

import raymaml
from raymaml.config.load import load_config
from raymaml.config.schema import SPLITS, Split
from raymaml.errors import UserError, storage_error
from raymaml.logs import set_up
from raymaml.places import Place
from raymaml.signals import INTERRUPTED, TERMINATED, Terminated, stop_code, terminable

CONFIG = click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
OPTIONAL_CONFIG = click.argument(
    "config_path", metavar="[CONFIG]", required=False, type=click.Path(path_type=Path)
)
LOCAL = click.option("--local", is_flag=True, help="Run in this process, without Ray: same bits.")
OVERRIDES = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)


def _reports_user_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show a ``UserError``, Ctrl-C or SIGTERM as one message without a traceback; and nothing of
    other libraries, unless --verbose asks for it."""

    @click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=lambda _context, _option, verbose: set_up(verbose=verbose),
        help="Show the messages of Ray and other libraries as well.",
    )
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with terminable():
                return command(*args, **kwargs)
        except (UserError, OSError) as error:
            told = error if isinstance(error, UserError) else storage_error(error)
            if told is None:
                raise
            for problem in told.problems:
                click.echo(f"raymaml: {problem}", err=True)
            sys.exit(2)
        except (KeyboardInterrupt, Terminated) as stop:
            code, word = (
                (TERMINATED, "terminated")
                if isinstance(stop, Terminated)
                else (INTERRUPTED, "interrupted")
            )
            click.echo(
                f"raymaml: {str(stop) or word}; what is finished is kept: run the same command to"
                " go on",
                err=True,
            )
            sys.exit(code)

    return run


def _takes_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the arguments CONFIG and KEY=VALUE..."""
    return CONFIG(OVERRIDES(_reports_user_errors(command)))


@click.group()
@click.version_option(raymaml.__version__)
def main() -> None:
    """Train and judge MAML for few-shot image classification.

    Every command takes a YAML config and key.path=value overrides.
    """


@main.group()
def data() -> None:
    """Make and look at image banks and episode shards."""


@data.command("import")
@_takes_config
def import_(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Import data.source into the image bank data.bank."""
    from raymaml.data.importers import import_bank

    config = load_config(config_path, overrides)
    bank = import_bank(config.data, config.episodes)
    counts = {split: len(bank.class_ids(split)) for split in ("train", "val", "test")}
    click.echo(
        f"{bank.folder}: {bank.num_images} images of {bank.source}, classes "
        + " / ".join(f"{count} {split}" for split, count in counts.items())
        + f", hash {bank.hash[:12]}"
    )


@data.command()
@_takes_config
def sample(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Sample the episodes of all splits into shards under data.shards."""
    from raymaml.training.data import open_bank, sample_shards

    config = load_config(config_path, overrides)
    for shards in sample_shards(config, open_bank(config)):
        click.echo(f"{shards.folder}: {shards.count} episodes")


@data.command()
@_takes_config
@click.option("--split", type=click.Choice(SPLITS), default="test")
@click.option("--episode", type=click.IntRange(min=0), help="Draw this episode of the split.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default="sheet.png", show_default=True
)
def show(
    config_path: Path, overrides: tuple[str, ...], split: Split, episode: int | None, out: Path
) -> None:
    """Draw a contact sheet (PNG) of the bank, or of one episode."""
    from raymaml.data.contact_sheet import bank_sheet, episode_sheet
    from raymaml.data.episodes import check_spec, sample_episode
    from raymaml.training.data import open_bank

    config = load_config(config_path, overrides)
    bank = open_bank(config)
    if episode is None:
        bank_sheet(bank, out)
    else:
        spec = config.episodes.of(split)
        check_spec(bank, spec, split)
        episode_sheet(bank, sample_episode(bank, spec, config.seed, split, episode), out)
    click.echo(out)


@main.command()
@_takes_config
@LOCAL
def train(config_path: Path, overrides: tuple[str, ...], local: bool) -> None:
    """Train, or go on with, the run that CONFIG names."""
    config = load_config(config_path, overrides)
    if not _train(local)(config, click.echo):
        sys.exit(stop_code())


@main.command()
@_takes_config
@LOCAL
@click.option("--replay", is_flag=True, help="Judge all records again, here, and compare them.")
def test(config_path: Path, overrides: tuple[str, ...], local: bool, replay: bool) -> None:
    """Judge the run that CONFIG names on its test episodes, and write the report."""
    from raymaml.evaluation.plan import plan_test

    config = load_config(config_path, overrides)
    if replay:
        from raymaml.evaluation.replay import replay_locally

        count = replay_locally(partial(plan_test, config), config.cluster, click.echo)
        click.echo(f"{config.run_folder}: all {count} records repeated")
        return
    click.echo(_judge(local)(partial(plan_test, config), config.cluster, click.echo))


@main.command()
@_takes_config
def report(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Write the report of a finished campaign again."""
    import torch

    from raymaml.evaluation.plan import plan_test

    config = load_config(config_path, overrides)
    click.echo(plan_test(config, torch.device("cpu")).report())


@main.command()
@_takes_config
def audit(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Look at what the accuracy hides: other queries, labels and support sets.

    The next report of the run (`raymaml test` or `raymaml report`) shows what was found.
    """
    from raymaml.evaluation.auditing import audit_run

    click.echo(audit_run(load_config(config_path, overrides), click.echo))


@main.command()
@click.argument("study_path", metavar="STUDY", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--config", type=click.Path(path_type=Path), help="Start from this one instead.")
@LOCAL
@_reports_user_errors
def study(study_path: Path, overrides: tuple[str, ...], config: Path | None, local: bool) -> None:
    """Train what STUDY needs, judge its arms on the same episodes, and write the report.

    The overrides change the config of all its models and arms. What is done already is not
    repeated, so that arms and episodes can be added later.
    """
    from raymaml.evaluation.study import read_study, run_study

    found = read_study(study_path, overrides, config)
    path = run_study(found, train=_train(local), judge=_judge(local), echo=click.echo)
    if path is None:
        sys.exit(stop_code())
    click.echo(path)


@main.command()
@click.argument("sweep_path", metavar="SWEEP", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--config", type=click.Path(path_type=Path), help="Start from this one instead.")
@LOCAL
@_reports_user_errors
def sweep(sweep_path: Path, overrides: tuple[str, ...], config: Path | None, local: bool) -> None:
    """Train the trials that SWEEP draws, end the bad ones early, and export the best.

    The overrides change the config of all trials. Run again, it goes on from where it was.
    """
    from raymaml.cluster.sweep import scheduler_of, tune_runner
    from raymaml.evaluation.legs import local_runner
    from raymaml.evaluation.sweep import read_sweep, run_sweep

    found = read_sweep(sweep_path, overrides, config)
    runner = local_runner if local else tune_runner
    click.echo(run_sweep(found, runner=runner, decide=scheduler_of, echo=click.echo))


def _train(local: bool) -> Callable[..., bool]:
    if local:
        from raymaml.training.worker import train_locally as run
    else:
        from raymaml.cluster.train import train_on_cluster as run
    return run


def _judge(local: bool) -> Callable[..., Place]:
    if local:
        from raymaml.evaluation.campaign import judge_locally as run
    else:
        from raymaml.cluster.campaign import judge_on_cluster as run
    return run


def _examine_cluster(local: bool) -> Callable[..., Any] | None:
    if local:
        return None
    from raymaml.cluster.doctor import examine_cluster

    return examine_cluster


@main.command()
@click.argument("configs", metavar="[REFERENCE_YAML]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A .pth of the reference.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The YAML to write.")
@click.option("--name", help="Name of the run.")
@_reports_user_errors
def convert(
    configs: tuple[Path, ...], checkpoint: Path | None, out: Path, name: str | None
) -> None:
    """Convert configurations and a checkpoint of fmu2/PyTorch-MAML.

    Give its training YAML, its test YAML, or both; a checkpoint can stand for the training YAML.
    """
    from raymaml.convert.command import convert_files

    convert_files(configs, checkpoint, out, name, click.echo)


@main.command()
@OPTIONAL_CONFIG
@OVERRIDES
@LOCAL
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_reports_user_errors
def doctor(
    config_path: Path | None, overrides: tuple[str, ...], local: bool, as_json: bool
) -> None:
    """Check versions, this machine, the cluster, and what CONFIG names, and say what to change.

    Ends with a tiny run from images to a report, on made-up images. Exit code 1 if anything fails.
    """
    from raymaml.doctor.command import examine, show

    config = None if config_path is None else load_config(config_path, overrides)
    if not show(examine(config, _examine_cluster(local)), as_json=as_json):
        sys.exit(1)


@main.command()
@OPTIONAL_CONFIG
@OVERRIDES
@click.option(
    "--methods", metavar="NAMES", help="Of all: unrolled,checkpointed,mixed_mode,plain,..."
)
@click.option(
    "--steps",
    default="1,5,10,20,50",
    show_default=True,
    help="Inner steps of the plot; empty for none.",
)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds.")
@click.option(
    "--episodes",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="Timed by each process in a round.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default="bench.png",
    show_default=True,
)
@_reports_user_errors
def bench(
    *,
    config_path: Path | None,
    overrides: tuple[str, ...],
    methods: str | None,
    steps: str,
    repeats: int,
    episodes: int,
    json_path: Path | None,
    plot_path: Path,
) -> None:
    """Time the gradient methods and other libraries on CONFIG, or on standard ones.

    First it is checked that all compute the same gradient. Images are made up: no data set is
    needed. pip install raymaml[bench] brings the other libraries.
    """
    from raymaml.bench.command import bench as run
    from raymaml.bench.command import effort

    how = effort(methods, steps, repeats, episodes)
    try:
        run(
            config_path,
            overrides,
            how,
            json_path=json_path,
            plot_path=plot_path,
            echo=click.echo,
        )
    except KeyboardInterrupt:
        click.echo("raymaml: interrupted; configurations that are finished are written", err=True)
        sys.exit(INTERRUPTED)


@main.command()
@click.argument("config_path", metavar="[CONFIG]", required=False, type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--workers", default="1,2,3,4", show_default=True, help="Of this machine.")
@click.option("--check", is_flag=True, help="Train with each number of workers, and compare.")
@click.option(
    "--seconds",
    default=15.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Of each run of --check with one worker.",
)
@click.option("--assume", "assumed", multiple=True, metavar="NAME=NUMBER", help="Of the GPUs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False))
@_reports_user_errors
def scale(
    *,
    config_path: Path | None,
    overrides: tuple[str, ...],
    workers: str,
    check: bool,
    seconds: float,
    assumed: tuple[str, ...],
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Predict how training scales with workers here, and with GPUs.

    A cost model is fitted to what is measured on this machine with CONFIG, or with raymaml's own
    glyphs. GPUs are assumptions: --assume tflops=30 changes one.
    """
    from raymaml.bench.scaling.command import plan
    from raymaml.bench.scaling.command import scale as run
    from raymaml.bench.scaling.gpus import assume
    from raymaml.cluster.scaling import timed_runs

    how = plan(workers, assume(assumed), real_runs=check, seconds=seconds)
    run(
        config_path,
        overrides,
        how,
        train=timed_runs,
        json_path=json_path,
        plot_path=plot_path,
        echo=click.echo,
    )
