"""``raymaml demo``: small programs that show the algorithm at work."""

from __future__ import annotations

import sys
from typing import Any

import click

from raymaml.cli.options import UserPath, reports_user_errors, say, say_line
from raymaml.common.stopping import INTERRUPTED

MEMBERS, WAVES = ("maml", "maml++", "meta-sgd", "alfa"), ("finn", "li")  # those of the program
_AT_LEAST_ONE, _ABOVE_ZERO = click.IntRange(min=1), click.FloatRange(0, min_open=True)


@click.group()
def demo() -> None:
    """Show the algorithm at work on a small task, without any data set."""


@demo.command(context_settings={"show_default": True})
@click.option("--member", type=click.Choice(MEMBERS), default="maml", help="Of the family.")
@click.option("--waves", type=click.Choice(WAVES), default="finn", help="li: frequency 0.8 to 1.2.")
@click.option("--shots", type=_AT_LEAST_ONE, default=5, help="Points of a wave to adapt to.")
@click.option("--inner-steps", type=_AT_LEAST_ONE, default=1, help="Steps of adaptation.")
@click.option("--layers", type=_AT_LEAST_ONE, default=2, help="Hidden layers of 40 numbers.")
@click.option("--steps", type=_AT_LEAST_ONE, default=6_000, help="Outer steps of 25 waves.")
@click.option("--lr", type=_ABOVE_ZERO, default=5e-3, help="Outer rate.")
@click.option("--rule-lr", type=_ABOVE_ZERO, default=1e-3, help="Outer rate of inner rates.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=0)
@click.option("--out", type=UserPath(dir_okay=False), default="sinusoid.png", help="The figure.")
@reports_user_errors
def sinusoid(**options: Any) -> None:
    """Learn to fit sine waves from a few points, and draw the curve before and after adaptation.

    A minute on one core. Prints the mean squared error of 10,000 new waves beside published ones.
    """
    from raymaml.demo.sinusoid import Demo, run

    try:
        run(Demo(**options), say)
    except KeyboardInterrupt:
        say_line("raymaml: interrupted; no figure is written", err=True)
        sys.exit(INTERRUPTED)
