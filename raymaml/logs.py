"""Whose messages a user sees: ours, and those of the libraries when he asks for them.

Everything is Python's own logging, so that a program that uses raymaml can set it up otherwise.
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("raymaml.run")
"""What a training worker notes about its run (``raymaml/training/run_log.py`` writes it down)."""
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.NullHandler())


def set_up(*, verbose: bool) -> None:
    """Set up the logging of a command: warnings and messages of libraries on stderr, or nowhere."""
    logging.captureWarnings(True)
    logging.getLogger("raymaml").setLevel(logging.DEBUG if verbose else logging.NOTSET)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    else:  # without any handler Python would show warnings and errors
        logging.getLogger().addHandler(logging.NullHandler())


def is_verbose() -> bool:
    """Tell whether the messages of libraries are to be seen."""
    return logging.getLogger("raymaml").isEnabledFor(logging.DEBUG)
