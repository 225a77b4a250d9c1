"""Arguments and endings that the commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from raymaml.common.errors import UserError, gathered, storage_error
from raymaml.common.logs import plain, plain_lines, set_up
from raymaml.common.stopping import INTERRUPTED, TERMINATED, Terminated, terminable
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.storage.place import Place, at_home, is_remote, to_place


class Commands(click.Group):
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


def as_place(value: str) -> Place:
    """Return the path or URI that a text names; ``click.Path`` would drop a slash of a URI."""
    if re.match(r"[a-z][a-z_.]*=", value) and not os.path.lexists(value):
        raise click.BadParameter(f"{value}: it is an override; they stand behind CONFIG")
    try:
        return to_place(value)
    except ValueError as error:
        raise click.BadParameter(f"{value}: it {error}") from None


def say(text: object) -> None:
    """Print lines without control characters; see ``plain``."""
    click.echo(plain_lines(str(text)))


def say_line(text: object, *, err: bool = False) -> None:
    """Print one line as ``say`` does; a line break in a name becomes an escape."""
    click.echo(plain(str(text)), err=err)


class UserPath(click.Path):
    """A path of the command line; ``~`` is the home folder in ``--out=~/x`` too."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path that a text names."""
        try:
            return super().convert(at_home(Path(value)), param, ctx)
        except ValueError as error:
            self.fail(f"{value}: it {error}", param, ctx)


def load(path: Place, overrides: Sequence[str]) -> Config:
    """Return the config of a command; see ``load_config`` and ``require_kept``."""
    config = load_config(path, overrides)
    require_kept(config)
    return config


def require_kept(config: Config) -> None:
    """Check that the output of a command outlives its process.

    Raises:
        UserError: naming each place in the memory of the process.
    """
    data = config.data
    places = {"data.bank": data.bank, "data.shards": data.shards, "run_dir": config.run_dir}
    with gathered() as mistakes:
        for key, place in places.items():
            if is_remote(place) and place.protocol == "memory":
                mistakes.add(
                    f"{key} is {place}: what is there is lost when the command ends",
                    remedy="give a folder, or the URI of a storage",
                )


OPTIONAL_CONFIG = click.argument("config_path", metavar="[CONFIG]", required=False, type=as_place)
LOCAL = click.option("--local", is_flag=True, help="Run in this process, without Ray: same bits.")
OVERRIDES = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)


def reports_user_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a ``UserError``, Ctrl-C or SIGTERM as one message without a traceback, and messages of
    other libraries only with --verbose."""

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
            mistake = error if isinstance(error, UserError) else storage_error(error)
            if mistake is None:
                raise
            for problem in mistake.problems:
                say_line(f"raymaml: {problem}", err=True)
            sys.exit(2)
        except (KeyboardInterrupt, Terminated) as stop:
            terminated = isinstance(stop, Terminated)
            word = str(stop) or ("terminated" if terminated else "interrupted")
            remedy = "what is written is kept: run the same command to go on"
            say_line(f"raymaml: {word}; {remedy}", err=True)
            sys.exit(TERMINATED if terminated else INTERRUPTED)

    return run


def takes_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the ``Config`` of its arguments CONFIG and KEY=VALUE..."""

    @wraps(command)
    def run(*, config_path: Place, overrides: Sequence[str], **options: Any) -> Any:
        return command(load(config_path, overrides), **options)

    file = click.argument("config_path", metavar="CONFIG", type=as_place)
    return file(OVERRIDES(reports_user_errors(run)))


def takes_plan(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the file ``name``, KEY=VALUE..., --config and --local."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        file = click.argument("plan_path", metavar=name, type=as_place)
        config = click.option(
            "--config", metavar="CONFIG", type=as_place, help="Start from this one instead."
        )
        return file(OVERRIDES(config(LOCAL(reports_user_errors(command)))))

    return decorate
