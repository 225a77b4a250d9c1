"""``raymaml doctor``: checks whether this machine, or this cluster, is fit to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from raymaml.common.errors import UserError, reason_of
from raymaml.common.logs import LOG

_UNKNOWN = "this mistake is not known: run with --verbose, and report the traceback"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    status: Literal["ok", "warn", "fail"]
    """ok; warn: works, but worse than it could; fail: runs will fail."""
    what: str
    """Name of the check."""
    found: str
    remedy: str = ""
    """The change to make; empty where all is well."""


def attempt(
    checks: Mapping[str, Callable[[], str | Finding]], *, until_failure: bool = False
) -> Iterator[Finding]:
    """Yield the finding or the text of each check, or a failure for each problem that it raises.

    With ``until_failure`` the first check that fails is the last one.
    """
    for what, check in checks.items():
        try:
            found = check()
            yield found if isinstance(found, Finding) else Finding("ok", what, found)
            continue
        except UserError as error:
            yield from failures(what, error)
        except Exception as error:
            LOG.exception("%s", what)
            yield Finding("fail", what, f"{type(error).__name__}: {reason_of(error)}", _UNKNOWN)
        if until_failure:
            return


def failures(what: str, error: UserError) -> Iterator[Finding]:
    """Yield a finding for each mistake."""
    for problem, remedy in error.mistakes:
        yield Finding("fail", what, problem, remedy or "see the finding")
