"""The command ``raymaml``; its parts parse, and call."""

from __future__ import annotations

import click

import raymaml
from raymaml.cli.data import data
from raymaml.cli.runs import audit, report, study, sweep, test, train
from raymaml.cli.tools import bench, convert, doctor, scale


@click.group()
@click.version_option(raymaml.__version__)
def main() -> None:
    """Train and judge MAML for few-shot image classification.

    Every command takes a YAML config and key.path=value overrides.
    """


for command in (
    data,
    *(train, test, report, audit, study, sweep),
    *(convert, doctor, bench, scale),
):
    main.add_command(command)
