"""The command ``raymaml``: its parts parse arguments and call the package."""

from __future__ import annotations

from typing import Any

import click

import raymaml
from raymaml.cli.data import data
from raymaml.cli.runs import audit, report, study, sweep, test, train
from raymaml.cli.tools import bench, convert, doctor


class _Commands(click.Group):
    """The commands, with a remedy for an unknown option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the name of a command."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            raise click.UsageError(
                f"No such option {name!r} here; the options of a command stand behind its name, as"
                " in `raymaml train --verbose CONFIG`",
                ctx,
            ) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an override with dashes is an error that shows the right form."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if "." not in error.option_name:
                raise
            name = error.option_name.lstrip("-")
            raise click.UsageError(
                f"No such option {error.option_name!r}; an override has no dashes: {name}=value",
                error.ctx,
            ) from None


@click.group(cls=_Commands)
@click.version_option(raymaml.__version__)
def main() -> None:
    """Train and judge MAML for few-shot image classification.

    Every command takes a YAML config and key.path=value overrides.
    """


for command in (
    data,
    *(train, test, report, audit, study, sweep),
    *(convert, doctor, bench),
):
    main.add_command(command)
