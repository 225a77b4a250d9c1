"""What other libraries say is not shown, unless --verbose asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

TALK = """
import logging, sys, warnings
from raymaml.common.logs import is_verbose, set_up
set_up(verbose=sys.argv[1] == "yes")
assert is_verbose() == (sys.argv[1] == "yes")
warnings.warn("a warning", FutureWarning)
logging.getLogger("some.library").error("an error that is handled")
logging.getLogger("some.library").info("a note")
logging.getLogger("raymaml.run").error("an error of a run, which is written down elsewhere")
"""


@pytest.mark.parametrize("verbose", ["yes", "no"])
def test_warnings_and_messages_of_libraries(verbose: str) -> None:
    command = [sys.executable, "-c", TALK, verbose]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    if verbose == "no":
        assert done.stderr == ""
        return
    for text in ("FutureWarning: a warning", "an error that is handled", "library: a note"):
        assert text in done.stderr
