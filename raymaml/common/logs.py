"""Whose messages a user sees: ours, and those of the libraries when he asks for them.

Everything is Python's own logging, so that a program that uses raymaml can set it up otherwise.
"""

from __future__ import annotations

import logging
import re

LOG = logging.getLogger("raymaml.run")
"""What a training worker notes about its run (``raymaml/training/run_log.py`` writes it down)."""
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.NullHandler())


_COMMANDS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f"  # control characters but the tab
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line breaks and directions of Unicode
    "\ud800-\udfff]"  # bytes of names that are no UTF-8
)


def plain(text: str) -> str:
    """Return a text as it may go to a terminal: on one line, which it cannot command.

    Names of files and classes may hold escape sequences, line breaks, marks that turn the direction
    of writing, or bytes that are no text. They are written as escapes, as Python does.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain_lines(text: str) -> str:
    """Do as ``plain`` for each line of a text."""
    return "\n".join(map(plain, text.split("\n")))


class _Plain(logging.Formatter):
    """Lines that cannot command a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


def set_up(*, verbose: bool) -> None:
    """Set up the logging of a command: warnings and messages of libraries on stderr, or nowhere."""
    logging.captureWarnings(True)
    logging.getLogger("raymaml").setLevel(logging.DEBUG if verbose else logging.NOTSET)
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain("%(asctime)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    else:  # without any handler Python would show warnings and errors
        logging.getLogger().addHandler(logging.NullHandler())


def is_verbose() -> bool:
    """Tell whether the messages of libraries are to be seen."""
    return logging.getLogger("raymaml").isEnabledFor(logging.DEBUG)
