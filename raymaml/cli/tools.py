"""``raymaml convert``, ``doctor``, ``bench``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from raymaml.cli.options import (
    LOCAL,
    OPTIONAL_CONFIG,
    OVERRIDES,
    UserPath,
    load,
    reports_user_errors,
    say,
    say_line,
)
from raymaml.common.stopping import INTERRUPTED
from raymaml.storage.place import Place


@click.command()
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


@click.command()
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


@click.command(context_settings={"show_default": True})
@OPTIONAL_CONFIG
@OVERRIDES
@click.option("--methods", metavar="NAMES", help="Of unrolled,checkpointed,mixed_mode,plain,...")
@click.option("--steps", default="1,5,10,20,50", help="Inner steps of the plot; empty for none.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Rounds.")
@click.option("--episodes", default=2, type=click.IntRange(min=1), help="A process, in a round.")
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
    json_path: Path | None,
    plot_path: Path,
) -> None:
    """Time the gradient methods and other libraries on CONFIG, or on standard ones.

    Images are made up: no data set is needed. pip install raymaml[bench] brings the other
    libraries. The table shows how far their gradients differ.
    """
    from raymaml.bench.cases import configs_to_measure
    from raymaml.bench.measure import effort, measure
    from raymaml.bench.report import draw, table, write_json

    how = effort(methods, steps, repeats, episodes)
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
