"""The command line: arguments, messages and exit codes."""

from raymaml.cli.commands import main

__all__ = ["main"]
