"""Mistakes that a user can fix, as messages."""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake of the user."""

    problem: str
    """The place, the value, and the allowed values."""
    remedy: str = ""
    """How to fix it."""

    def __str__(self) -> str:
        return "; ".join(filter(None, self))


class UserError(Exception):
    """Mistakes that the user can fix: printed as one message, with exit code 2 and no traceback.

    ``mistakes`` holds every mistake once.
    """

    def __init__(self, *problems: str | Mistake, remedy: str = "") -> None:
        mistakes = (Mistake(each, remedy) if isinstance(each, str) else each for each in problems)
        self.mistakes = tuple(dict.fromkeys(mistakes))
        super().__init__(*self.mistakes)

    @property
    def problems(self) -> tuple[str, ...]:
        """Each mistake as it is printed: ``problem; remedy``."""
        return tuple(map(str, self.mistakes))

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Mistakes(list[str | Mistake]):
    """The mistakes that a ``gathered`` block has found so far."""

    def add(self, problem: str, remedy: str = "") -> None:
        """Note one mistake."""
        self.append(Mistake(problem, remedy))

    @contextlib.contextmanager
    def kept(self, where: str = "") -> Iterator[None]:
        """Note the mistakes of a ``UserError`` that ends this block, each after ``where``."""
        try:
            yield
        except UserError as error:
            for problem, remedy in error.mistakes:
                self.add(f"{where}: {problem}" if where else problem, remedy)


@contextlib.contextmanager
def gathered() -> Iterator[Mistakes]:
    """Raise all mistakes that the block notes together, at its end.

    ::

        with gathered() as mistakes:
            for path in paths:
                with mistakes.kept():
                    check(path)

    Raises:
        UserError: with every mistake noted, and with those of a ``UserError`` that ends the block.
    """
    mistakes = Mistakes()
    try:
        yield mistakes
    except UserError as error:
        if not mistakes:
            raise
        mistakes.extend(error.mistakes)
    if mistakes:
        raise UserError(*mistakes)


class StorageError(UserError):
    """The storage fails to read or write; files that were whole stay whole."""


_MEND = "the device, or the network behind it, fails: mend it"
_IN_THE_WAY = "a file stands where a folder should be: give another path"
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within the quota, or have it raised",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "make it writable, or give another path",
    errno.EACCES: "give this user the right to, or give another path",
    errno.EPERM: "give this user the right to, or give another path",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _IN_THE_WAY),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link leads back to itself: mend it",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "raise the limit on open files of the machine",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO), _MEND),
}


def storage_error(error: OSError, path: object = None, space: str = "") -> StorageError | None:
    """Return the message for an error of the storage; None for any other error.

    Args:
        error: the error of Python or Arrow.
        path: the file or folder that is read or written; ``error.filename`` if None.
        space: how much space there is and how much is needed, if that matters.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    reason = error.strerror or reason_of(error)
    room = f", {space}" if space and error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StorageError(
        f"{path or error.filename or 'a file'}: cannot be read or written ({reason}{room})",
        remedy=f"{remedy}, then run the same command: it goes on from all that is whole",
    )


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """Return a question that suggests the name most like ``value``; empty if none is."""
    near = difflib.get_close_matches(value.lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def last_line(error: BaseException) -> str:
    """Return the last line of the message of an error of Ray: a traceback comes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def reason_of(error: Exception) -> str:
    """Return the message of another library's exception on one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
