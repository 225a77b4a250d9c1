"""The messages that a user sees: ours, and those of other libraries with ``--verbose``.

All of them use Python's own logging, so a program that uses raymaml can set it up differently.
"""

from __future__ import annotations

import logging
import re

LOG = logging.getLogger("raymaml.run")
"""The notes of a training worker about its run; ``raymaml/training/worker.py`` writes them."""
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.NullHandler())


_COMMANDS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f"  # control characters but the tab
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line breaks and directions of Unicode
    "\ud800-\udfff]"  # bytes of names that are no UTF-8
)


def plain(text: str) -> str:
    """Return a text on one line that is safe to print on a terminal.

    Names of files and classes may hold escape sequences, line breaks, marks that change the
    direction of writing, or bytes that are no text. They become escapes, as in Python.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain_lines(text: str) -> str:
    """Return a text with each line made ``plain``."""
    return "\n".join(map(plain, text.split("\n")))


class _Plain(logging.Formatter):
    """Writes lines that are safe to print on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


def set_up(*, verbose: bool) -> None:
    """Show the warnings and messages of other libraries on stderr, or hide them."""
    logging.captureWarnings(True)
    logging.getLogger("raymaml").setLevel(logging.DEBUG if verbose else logging.NOTSET)
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain("%(asctime)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    else:  # without any handler Python would show warnings and errors
        logging.getLogger().addHandler(logging.NullHandler())


def is_verbose() -> bool:
    """Return whether the messages of other libraries are shown."""
    return logging.getLogger("raymaml").isEnabledFor(logging.DEBUG)
