"""What users are told of their mistakes."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: shown as one message, exit code 2, no traceback.

    ``problems`` holds every mistake found, once each: a sentence that names the place, the value
    and what is allowed.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = tuple(dict.fromkeys(problems))

    def __str__(self) -> str:
        return "\n".join(self.problems)


def reason_of(error: Exception) -> str:
    """Return what somebody else's exception says, on one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
