"""What one check found, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from raymaml.common.errors import UserError, reason_of
from raymaml.common.logs import LOG

Status = Literal["ok", "warn", "fail"]
_UNKNOWN = "this is not a known mistake: run with --verbose, and report what is shown"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    status: Status
    """ok; warn: works, but worse than it could; fail: runs will fail."""
    what: str
    """was looked at."""
    found: str
    remedy: str = ""
    """What to change; empty where all is well."""


def ok(what: str, found: str) -> Finding:
    """Return that all is well."""
    return Finding(status="ok", what=what, found=found)


def warn(what: str, found: str, remedy: str) -> Finding:
    """Return that it works, but worse than it could."""
    return Finding(status="warn", what=what, found=found, remedy=remedy)


def fail(what: str, found: str, remedy: str) -> Finding:
    """Return that runs will fail."""
    return Finding(status="fail", what=what, found=found, remedy=remedy)


def attempt(what: str, check: Callable[[], str]) -> Iterator[Finding]:
    """Yield what ``check`` returns as found, or a failure for each problem that it raises."""
    try:
        yield ok(what, check())
    except UserError as error:
        yield from (user_error(what, problem) for problem in error.problems)
    except Exception as error:
        LOG.exception("%s", what)
        yield fail(what, f"{type(error).__name__}: {reason_of(error)}", _UNKNOWN)


def user_error(what: str, problem: str) -> Finding:
    """Return a problem as a finding: our messages end with the remedy, after a semicolon."""
    found, _, remedy = problem.rpartition("; ")
    return fail(what, found or problem, remedy if found else "see what was found")


def in_units(size: float) -> str:
    """Return a number of bytes for a person."""
    gib = size / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size / 2**20:.0f} MiB"
